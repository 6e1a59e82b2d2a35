"""Optimizers: Adam whose steps have a size of their own for every element, and one that needs no backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BUNDLE_BYTES = 2**26  # of parameters whose values of before are kept at a time


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, on the same storage: its part of a sharded one, else all of it."""
    found: Any = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


class ScaledAdam(torch.optim.Adam):
    """Adam (Kingma & Ba, ICLR 2015, arXiv 1412.6980), its step times a size: theta <- theta - lr size m / sqrt(v).

    Adam's step does not depend on how large a gradient is, so it has to be told how large a parameter is. The channels
    of a layer differ by orders of magnitude where a batch norm was folded into them: with one rate for the tensor, the
    small ones would be shaken to pieces while the large ones stand still.

    Args:
        groups: as Adam takes them; ``lr`` is relative where a size is given.
        sizes: parameter → what its steps are multiplied by, broadcast to it; 1 for those that are not in it. They are
            no part of the optimizer's state. Of a parameter that is sharded over processes, those of this process.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], sizes: Mapping[Tensor, Tensor], **settings: Any):
        super().__init__(groups, **settings)
        self.sizes = dict(sizes)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Adam's, on a bundle of parameters at a time: what they were before is kept for one bundle, not for all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = [group["params"] for group in self.param_groups]
        try:
            for bundle in _bundles(everything):
                for group, parameters in zip(self.param_groups, bundle, strict=True):
                    group["params"] = parameters
                sized = [parameter for part in bundle for parameter in part if parameter in self.sizes]
                parameters, sizes = [local(p) for p in sized], [self.sizes[p] for p in sized]
                before = [parameter.clone() for parameter in parameters]
                super().step()
                if parameters:
                    torch._foreach_sub_(parameters, before)
                    torch._foreach_mul_(parameters, sizes)
                    torch._foreach_add_(parameters, before)
        finally:
            for group, parameters in zip(self.param_groups, everything, strict=True):
                group["params"] = parameters
        return loss


def _bundles(groups: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The same groups with a part of their parameters each time: up to BUNDLE_BYTES of them, or one."""
    bundle: list[list[Tensor]] = [[] for _ in groups]
    size = 0
    for index, parameters in enumerate(groups):
        for parameter in parameters:
            its = parameter.numel() * parameter.element_size()
            if size and size + its > BUNDLE_BYTES:
                yield bundle
                bundle, size = [[] for _ in groups], 0
            bundle[index].append(parameter)
            size += its
    yield bundle


class ZerothOrder(torch.optim.Optimizer):
    """Descent along random directions; two forwards a step, no gradient and no state beside a few numbers.

    SPSA (Spall, 1992) as MeZO (Malladi et al., NeurIPS 2023, arXiv 2305.17333) and ZeroQAT (arXiv 2509.00031) use it,
    with z normal and u what each parameter is measured in::

        g = (L(theta + eps u z) - L(theta - eps u z)) / (2 eps),     theta <- theta - rate g u z / rms(g)

    g z is the gradient with respect to theta / u in the mean, up to eps^2. z is drawn again from its seed wherever it
    is needed, so that it never stands in memory for more than one parameter.

    Differences from the papers: g is divided by the root of its running mean square, as Adam does for each parameter,
    so that a rate does not depend on how large the loss is.

    Args:
        groups: parameters and their ``lr``, times ``sizes`` their unit u; a scheduler that changes lr changes the rate.
        sizes: parameter → what its unit is multiplied by, broadcast to it; 1 for those that are not in it.
        eps: length of the two steps aside, in units.
        rate: length of a step, in units.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        sizes: Mapping[Tensor, Tensor],
        eps: float = 10.0,
        rate: float = 1.0,
        seed: int = 0,
    ):
        super().__init__(groups, {"lr": 1.0})
        self.sizes, self.eps, self.rate = dict(sizes), eps, rate
        for group in self.param_groups:
            group["unit"] = group["lr"]
        self.param_groups[0].update(seed=seed, num_steps=0, mean_square=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """``closure`` gives the loss and computes no gradient; it runs twice."""
        assert closure is not None
        first = self.param_groups[0]
        seed = first["seed"] * 2**32 + first["num_steps"]
        slope, loss = self.slope(closure, seed)
        first["num_steps"] += 1
        decay = 0.99
        first["mean_square"] = decay * first["mean_square"] + (1 - decay) * slope**2
        size = (first["mean_square"] / (1 - decay ** first["num_steps"])) ** 0.5
        if size > 0:
            self._move(seed, -self.rate * slope / size, scheduled=True)
        return loss

    def slope(self, closure: Callable[[], Any], seed: int) -> tuple[float, float]:
        """g of the direction that belongs to ``seed``, and the mean of the two losses."""
        self._move(seed, self.eps)
        above = float(closure())
        self._move(seed, -2 * self.eps)
        below = float(closure())
        self._move(seed, self.eps)
        return (above - below) / (2 * self.eps), (above + below) / 2

    def direction(self, seed: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and u z, one after the other."""
        rng = torch.Generator().manual_seed(seed % 2**63)
        for group in self.param_groups:
            for parameter in group["params"]:
                z = torch.randn(parameter.shape, generator=rng).to(parameter)
                z *= group["unit"]
                if parameter in self.sizes:
                    z *= self.sizes[parameter]
                yield group, parameter, z

    def _move(self, seed: int, length: float, scheduled: bool = False) -> None:
        for group, parameter, z in self.direction(seed):
            parameter.data.add_(z, alpha=length * (group["lr"] / group["unit"] if scheduled else 1.0))
