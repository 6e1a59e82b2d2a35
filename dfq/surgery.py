"""Rewrites a float network, in place and without changing its function, so that its weights lie in plain torch layers.

:func:`dfq.modules.swap_layers` reaches a weight through the layer that multiplies with it. It cannot where the weight
is read by somebody else's code (``nn.MultiheadAttention``), is computed anew in every forward (weight normalization,
weight standardization) or is used by a class that merely equals a torch layer (GPT-2's transposed linear layer).

:func:`prepare` finds such modules by what they are made of and what they compute, never by class name, and rewrites the
objects themselves: references to them (shared modules, lists, hooks) stay valid. What cannot be shown to stay the same
is left alone. "The same" means in evaluation mode: a weight that follows its training mode (spectral normalization)
is a constant from here on. A parameter that two modules share is never replaced.

A sub-class that becomes its torch base class loses the methods it added; it is only known that it computes the same.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from dfq.hooks import evaluation_mode

# The plain layers with the operation each consists of: what dfq.modules can turn into quantized layers.
OPERATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


def prepare(module: nn.Module) -> list[tuple[str, str]]:
    """Rewrite what needs it, in place. Returns (module name, kind of rewrite) in order, for :func:`apply`.

    Kinds: ``constant`` (parametrized or hooked weights become plain parameters), ``attention``
    (``nn.MultiheadAttention`` becomes :class:`Attention`), ``experts`` (those of a mixture, which are one tensor each
    of transformers' layers, become layers of their own, :class:`Experts`), ``linear`` and ``transposed_linear`` (a
    module of its own that is a linear layer, with its weight as [O, I] or [I, O]), ``base_class`` (a sub-class that
    computes what its torch base class computes) and ``effective_weight`` (one that computes it with another, constant
    weight).
    Three more are for algorithms, which put them behind these: ``relu``, ``untied`` and ``bias``.
    """
    rewrites = []
    uses = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)

    def tied(parameters: Iterable[Tensor | None]) -> bool:
        return any(p is not None and uses[id(p)] > 1 for p in parameters)

    # named_modules() looks at a module's children after it has handed the module out: it sees them as rewritten.
    for name, part in module.named_modules():
        if _is_reparametrized(part) and not tied(_originals(part)):
            _make_constant(part)
            rewrites.append((name, "constant"))
    for name, part in module.named_modules():
        if _are_experts(part) and not tied(part._parameters.values()):
            _become_experts(part)
            rewrites.append((name, "experts"))
    for name, part in module.named_modules():
        kind, weights = _find_rewrite(part)
        if kind is None or tied(part._parameters.get(key) for key in _replaced(part, kind)):
            continue
        for key, value in weights.items():
            part._parameters[key] = nn.Parameter(value.detach().clone(), part._parameters[key].requires_grad)
        REWRITES[kind](part)
        rewrites.append((name, kind))
    _turn_off_nested_tensors(module)
    return rewrites


def apply(module: nn.Module, rewrites: Iterable[tuple[str, str]]) -> None:
    """Repeat what :func:`prepare` did to a network of the same structure, whatever its weights are.

    Names, shapes and dtypes come out as they did there; the values are to be loaded.
    """
    for name, kind in rewrites:
        REWRITES[kind](module.get_submodule(name))
    _turn_off_nested_tensors(module)


# ------------------------------------------------------------------------------------------------ attention


class Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` out of four ``nn.Linear``: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    Arguments, results and attributes are those of ``nn.MultiheadAttention``; ``in_proj_weight`` and ``in_proj_bias``
    are None, which is also what keeps the fused kernels of torch's transformer layers away from the weights.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.split()

    def split(self) -> None:
        """Move the packed weights of ``nn.MultiheadAttention`` into layers."""
        packed = self.in_proj_weight
        weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if packed is not None:
            weights = [nn.Parameter(part.clone(), packed.requires_grad) for part in packed.detach().chunk(3)]
        biases: list[nn.Parameter | None] = [None] * 3
        if self.in_proj_bias is not None:
            trainable = self.in_proj_bias.requires_grad
            biases = [nn.Parameter(part.clone(), trainable) for part in self.in_proj_bias.detach().chunk(3)]
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")  # no random numbers
            layer.weight, layer.bias = weight, bias
            layer.training = self.training
            self.add_module(f"{name}_proj", layer)
            self.register_parameter(f"{name}_proj_weight", None)
        self.in_proj_weight = self.in_proj_bias = None
        self._qkv_same_embed_dim = False
        self.out_proj.__class__ = nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[N, L, E], [N, S, kdim], [N, S, vdim] → [N, L, E] and the weights [N, L, S] (per head: [N, H, L, S]).

        Or [L, N, E] and so on without ``batch_first``, or without N.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give attn_mask with it")  # as torch does
        is_batched, dtype = query.dim() == 3, query.dtype
        # Projected as they came: the three layers of a self-attention see one and the same tensor.
        q, k, v = (
            (x if self.batch_first else x.transpose(0, 1)) if is_batched else x.unsqueeze(0)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        num_samples = q.shape[0]
        num_extra = 0
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(num_samples, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(num_samples, 1, -1)], dim=1)
            num_extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            num_extra += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))

        # torch takes the hint at its word where it can, and then does not read the mask.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if attn_mask is not None and not is_causal:
            shape = (num_samples, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            mask = _additive(attn_mask, dtype).reshape(*shape, *attn_mask.shape[-2:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).reshape(-1, 1, 1, key_padding_mask.shape[-1])
            mask = padding if mask is None else mask + padding
        if mask is not None and num_extra:
            mask = F.pad(mask, (0, num_extra))  # everybody may look at the added keys

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        # [N, H, L, D] → the layout of the query, ahead of the projection: what comes out is contiguous.
        out = out.permute(2, 0, 1, 3) if is_batched and not self.batch_first else out.transpose(1, 2)
        out = self.out_proj(out.flatten(2))
        if not is_batched:
            return out.squeeze(0), weights if weights is None else weights.squeeze(0)
        return out, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; in a boolean one, True means "do not look"."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _is_attention(part: nn.Module) -> bool:
    return (
        isinstance(part, nn.MultiheadAttention)
        and type(part).forward is nn.MultiheadAttention.forward
        and isinstance(part.out_proj, nn.Linear)
        and not any(_is_reparametrized(owner) for owner in (part, part.out_proj))
    )


def _become_attention(part: nn.Module) -> None:
    part.__class__ = Attention
    part.split()


def _turn_off_nested_tensors(module: nn.Module) -> None:
    """Keep torch's encoder from packing padded samples into nested tensors, which only its fused kernels can read.

    (Where it did so, its outputs at padded places were zeros; they now are what they are whenever gradients flow.)
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder) and any(isinstance(m, Attention) for m in part.modules()):
            part.use_nested_tensor = False


# ------------------------------------------------------------------------------------------------ mixtures of experts

STACKED = ("gate_up_proj", "up_proj", "down_proj")  # parameters [E, O, I], or [E, I, O]; biases [E, O] end in _bias


class Experts(nn.Module):
    """Mixed into the class of a mixture's experts: two ``nn.Linear`` for each, in children named by their numbers.

    All of them run in every forward, on the tokens that chose them, be there none: a forward's operations do not depend
    on its tokens.
    """

    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes: ``hidden_states`` [M, H], ``top_k_index`` and ``top_k_weights`` [M, K]; returns [M, H]."""
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(experts_of(self)):
            token, place = torch.where(top_k_index == index)
            x = hidden_states[token]
            if hasattr(expert, "gate_up_proj"):
                x = self._apply_gate(expert.gate_up_proj(x))
            else:
                x = self.act_fn(expert.up_proj(x))
            x = expert.down_proj(x) * top_k_weights[token, place, None]
            result = result.index_add(0, token, x.to(result.dtype))
        return result


def experts_of(part: nn.Module) -> list[nn.Module]:
    """The experts of :class:`Experts`, in order."""
    return [child for name, child in part.named_children() if name.isdigit()]


def stacked_experts(part: nn.Module, of_layer: Callable[[str, nn.Module], Tensor | None]) -> dict[str, Tensor]:
    """What ``of_layer(name, layer)`` gives of each expert's layers, by parameter's name and [E, ...] as it was before.

    Args:
        of_layer: [O, ...] of a layer called ``EXPERT.gate_up_proj`` or the like; None: nothing of any.
    """
    found: dict[str, list[Tensor]] = {}
    for index, expert in enumerate(experts_of(part)):
        for name, layer in expert.named_children():
            value = of_layer(f"{index}.{name}", layer)
            if value is not None:
                found.setdefault(name, []).append(value.mT if getattr(part, "is_transposed", False) else value)
    return {name: torch.stack(values) for name, values in found.items()}


def _are_experts(part: nn.Module) -> bool:
    """Whether a module's forward is that of :class:`Experts` on its stacked weights; found by trying."""
    own = {name: p for name, p in part._parameters.items() if p is not None}
    weights = {name: p for name, p in own.items() if not name.endswith("_bias")}
    names = set(weights)
    if not (names <= set(STACKED) and "down_proj" in names and len(names) == 2) or isinstance(part, Experts):
        return False
    if any(p.dim() != 3 for p in weights.values()) or len({len(p) for p in own.values()}) != 1:
        return False
    if not (hasattr(part, "act_fn") or hasattr(part, "_apply_gate")) or getattr(part, "has_post_expert_norm", False):
        return False
    number = len(weights["down_proj"])
    width = weights["down_proj"].shape[2 if getattr(part, "is_transposed", False) else 1]
    rng = torch.Generator().manual_seed(0)
    like = weights["down_proj"]
    x = torch.randn(7, width, generator=rng).to(like)
    chosen = torch.stack([torch.randperm(number, generator=rng)[: min(2, number)] for _ in range(7)]).to(like.device)
    shares = torch.rand(chosen.shape, generator=rng).to(like)
    twin = copy.copy(part)
    twin._parameters, twin._modules = dict(part._parameters), dict(part._modules)
    try:
        with torch.no_grad(), evaluation_mode(part):
            wanted = part(x, chosen, shares)
            _become_experts(twin)
            found = twin(x, chosen, shares)
    except Exception:  # whatever a forward raises on arguments that it does not take
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return False
    return bool((wanted - found).abs().max() <= max(1e-5, 4 * torch.finfo(like.dtype).eps) * wanted.abs().max())


@functools.cache
def _experts_class(kind: Any) -> Any:
    return type(kind.__name__, (Experts, kind), {"__module__": kind.__module__})


def _become_experts(part: nn.Module) -> None:
    """The layers' weights are parts of the stacked tensors, not copies of them."""
    transposed = getattr(part, "is_transposed", False)
    names = [name for name in STACKED if part._parameters.get(name) is not None]
    biases = {name: part._parameters.pop(f"{name}_bias", None) for name in names}
    stacked = {name: part._parameters.pop(name) for name in names}
    for index in range(len(stacked["down_proj"])):
        expert = nn.Module()
        for name, weights in stacked.items():
            weight = weights.detach()[index]
            weight, bias = weight.mT.contiguous() if transposed else weight, biases[name]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")  # no random numbers
            layer.weight = nn.Parameter(weight, weights.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach()[index], bias.requires_grad)
            expert.add_module(name, layer)
        expert.train(part.training)
        part.add_module(str(index), expert)
    part.__class__ = _experts_class(type(part))  # type: ignore[arg-type]  # mypy: a type is no Hashable


# ------------------------------------------------------------------------------------------------ computed weights

HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # torch's ways to set a weight ahead of every forward


def _is_reparametrized(part: nn.Module) -> bool:
    return parametrize.is_parametrized(part) or any(isinstance(h, HOOKS) for h in part._forward_pre_hooks.values())


def _originals(part: nn.Module) -> list[Tensor | None]:
    """The parameters a weight is computed from."""
    lists = part.parametrizations.values() if parametrize.is_parametrized(part) else []
    return [p for owner in (part, *lists) for p in owner._parameters.values()]


def _make_constant(part: nn.Module) -> None:
    """Replace every weight that torch computes ahead of a forward by its value in evaluation mode."""
    for hook in list(part._forward_pre_hooks.values()):
        if isinstance(hook, HOOKS):
            name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
            trainable = any(p.requires_grad for key, p in part._parameters.items() if key.startswith(f"{name}_"))
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, name)
                _forget(part._load_state_dict_pre_hooks, SpectralNormLoadStateDictPreHook)  # torch leaves it behind
            else:
                prune.remove(part, name)
            part._parameters[name].requires_grad_(trainable)
    if parametrize.is_parametrized(part):
        # torch writes into the class, which copies of the module share: without one of its own they would break.
        kind = type(part)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        part.__class__ = type(kind.__name__, kind.__bases__, own)
        for name in list(part.parametrizations):
            is_parameter = bool(part.parametrizations[name]._parameters)
            with evaluation_mode(part):
                parametrize.remove_parametrizations(part, name)
            if is_parameter and name in part._buffers:  # torch makes buffers of what needs no gradient
                part.register_parameter(name, nn.Parameter(part._buffers.pop(name), requires_grad=False))


def _forget(hooks: dict[int, Any], kind: type) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), kind)]:
        del hooks[key]


# ------------------------------------------------------------------------------------------------ plain layers


def _find_rewrite(part: nn.Module) -> tuple[str | None, dict[str, Tensor]]:
    """The kind of rewrite a module needs, or None, and the parameters that have to get other values for it."""
    if type(part) in OPERATIONS or "forward" in vars(part) or type(part).__call__ is not nn.Module.__call__:
        return None, {}  # plain already, or with a forward that is not its class's
    if _is_attention(part):
        return "attention", {}
    weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
    if part._modules or weight is None or is_lazy(weight) or not weight.is_floating_point():
        return None, {}
    base = next((base for base in OPERATIONS if isinstance(part, base)), None)
    if base is not None:
        if all(getattr(type(part), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")):
            return "base_class", {}
        probes = _linear_probes(weight.shape[1], weight) if base is nn.Linear else _conv_probes(part)
        outputs, used = _observe(part, probes, OPERATIONS[base])
        if _computes(part, base, weight, bias, probes, outputs):
            return "base_class", {}
        if len(used) == len(probes):
            other_weight, other_bias = used[0]
            alike = (other_weight.shape, other_weight.dtype) == (weight.shape, weight.dtype)
            alike = alike and (other_bias is None) == (bias is None)
            if alike and _computes(part, base, other_weight, other_bias, probes, outputs):
                found = {"weight": other_weight, "bias": other_bias}
                return "effective_weight", {key: value for key, value in found.items() if value is not None}
    elif (
        type(part).__module__.partition(".")[0] != "torch"  # known; an embedding's table would be copied for nothing
        and weight.dim() == 2
        and all(key in ("weight", "bias") or p is None for key, p in part._parameters.items())
    ):
        for kind, matrix in (("linear", weight), ("transposed_linear", weight.t())):
            if bias is None or bias.shape == matrix.shape[:1]:
                probes = _linear_probes(matrix.shape[1], weight)
                if _computes(part, nn.Linear, matrix, bias, probes, _observe(part, probes)[0]):
                    return kind, {}
    return None, {}


def _replaced(part: nn.Module, kind: str) -> Iterable[str]:
    """Names of the parameters that a rewrite replaces or gives other values; all others stay the objects they are."""
    if kind == "effective_weight":
        return part._parameters
    return {"attention": ("in_proj_weight", "in_proj_bias"), "transposed_linear": ("weight",)}.get(kind, ())


def _linear_probes(num_inputs: int, like: Tensor) -> list[Tensor]:
    """Inputs of several numbers of dimensions, which a layer that is not plainly linear may not treat alike."""
    return _noise([(2, num_inputs), (2, 3, num_inputs), (2, 3, 4, num_inputs)], like)


def _conv_probes(part: nn.Module) -> list[Tensor]:
    """Inputs whose sizes are a multiple of the stride and one more: padding that follows the size differs there."""
    weight = part._parameters["weight"]
    kernel = weight.shape[2:]
    # As tuples, whatever the sub-class made of them.
    dilation, stride = (torch.tensor(x).expand(len(kernel)).tolist() for x in (part.dilation, part.stride))
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [s * math.ceil(2 * extent / s) for extent, s in zip(extents, stride, strict=True)]
    shapes = [
        (2, weight.shape[1] * part.groups, *(size + (i + j) % 2 for j, size in enumerate(sizes))) for i in range(2)
    ]
    return _noise(shapes, weight)


def _noise(shapes: list[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Every other one is large: there a function that is linear around zero only gives itself away."""
    rng = torch.Generator().manual_seed(0)
    return [(1000.0 ** (i % 2) * torch.randn(shape, generator=rng)).to(like) for i, shape in enumerate(shapes)]


class _Watch(TorchFunctionMode):
    """Notes the weight and bias of every call of one operation."""

    def __init__(self, operation: Callable[..., Tensor] | None):
        super().__init__()
        self.operation = operation
        self.used: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is self.operation:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self.used.append((given["weight"], given.get("bias")))
        return func(*args, **kwargs)


@torch.no_grad()
def _observe(
    part: nn.Module, probes: list[Tensor], operation: Callable[..., Tensor] | None = None
) -> tuple[list[Any], list[tuple[Tensor, Tensor | None]]]:
    """What the module makes of the probes, and the weights and biases it gave to ``operation``; nothing on an error."""
    try:
        twin = copy.copy(part)  # a forward may write into its parameters or remember sizes
        twin._parameters, twin._buffers = copy.deepcopy(part._parameters), copy.deepcopy(part._buffers)
        twin._modules, twin.training = {}, False
        with _Watch(operation) as watch:
            return [twin.forward(x.clone()) for x in probes], watch.used
    except Exception:  # whatever a user's forward raises on an input it does not take
        return [], []


@torch.no_grad()
def _computes(
    part: nn.Module,
    base: type[nn.Module],
    weight: Tensor,
    bias: Tensor | None,
    probes: list[Tensor],
    outputs: list[Any],
) -> bool:
    """Whether ``base`` makes ``outputs`` of ``probes`` with this weight and bias, and the part's own padding etc."""

    def is_same(output: Any, x: Tensor) -> bool:
        if not isinstance(output, Tensor):
            return False
        try:
            expected = F.linear(x, weight, bias) if base is nn.Linear else base._conv_forward(part, x, weight, bias)
        except RuntimeError:  # a dtype that plain layers do not multiply
            return False
        if (output.shape, output.dtype) != (expected.shape, expected.dtype):
            return False
        tolerance = max(1e-5, 4 * torch.finfo(expected.dtype).eps)
        return bool((output - expected).abs().max() <= tolerance * expected.abs().max())

    return len(outputs) == len(probes) and all(map(is_same, outputs, probes))


def _become_base(part: nn.Module) -> None:
    part.__class__ = next(base for base in OPERATIONS if isinstance(part, base))


def _take_effective_weight(part: nn.Module) -> None:
    """What the weight was computed from goes, as only the class that goes knew what to do with it."""
    _become_base(part)
    part._parameters = {name: part._parameters[name] for name in ("weight", "bias")}
    part._buffers = {}


def _become_linear(part: nn.Module) -> None:
    part.__class__ = nn.Linear
    part.out_features, part.in_features = part.weight.shape
    part._parameters.setdefault("bias", None)


def _become_transposed_linear(part: nn.Module) -> None:
    weight = part.weight
    part.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    _become_linear(part)


# ------------------------------------------------------------------------------------------------ asked for


def _become_relu(part: nn.Module) -> None:
    """A ``nn.Hardtanh`` that begins at zero, such as ``nn.ReLU6``, without its upper limit."""
    part.__class__ = nn.ReLU
    del part.min_val, part.max_val


def _untie(part: nn.Module) -> None:
    """A weight of its own, for a layer that shares one."""
    part.weight = nn.Parameter(part.weight.detach().clone(), part.weight.requires_grad)


def _add_bias(part: nn.Module) -> None:
    """Zeros, for a plain layer without a bias."""
    weight, channels = part.weight, part.out_channels if hasattr(part, "out_channels") else part.weight.shape[0]
    part.bias = nn.Parameter(weight.new_zeros(channels), weight.requires_grad)


REWRITES: dict[str, Callable[[nn.Module], None]] = {
    "constant": _make_constant,
    "attention": _become_attention,
    "experts": _become_experts,
    "linear": _become_linear,
    "transposed_linear": _become_transposed_linear,
    "base_class": _become_base,
    "effective_weight": _take_effective_weight,
    "relu": _become_relu,
    "untied": _untie,
    "bias": _add_bias,
}
