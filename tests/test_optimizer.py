"""ScaledAdam: Adam in other units. ZerothOrder: the gradient without a backward pass."""

import weakref

import pytest
import torch

from dfq.optimizer import ScaledAdam, ZerothOrder


def trained(optimizer_of, start, steps=20):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = optimizer_of(parameter)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(parameter, step).backward()
        optimizer.step()
    return parameter.detach()


def loss_of(parameter, step):
    return (parameter - step).pow(3).sum() + parameter.sin().sum()


def test_is_adam_without_sizes_and_adam_with_other_rates_with_them():
    start = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    plain = trained(lambda p: torch.optim.Adam([p], lr=0.1), start)
    assert torch.equal(trained(lambda p: ScaledAdam([{"params": [p], "lr": 0.1}], {}), start), plain)
    sizes = torch.tensor([1e-3, 1.0, 3.0, 100.0]).view(4, 1, 1)
    got = trained(lambda p: ScaledAdam([{"params": [p], "lr": 0.1}], {p: sizes}), start)
    for row, size in enumerate(sizes.flatten().tolist()):
        wanted = trained(lambda p, lr=0.1 * size: torch.optim.Adam([p], lr=lr), start[row])
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_bundles_make_no_difference(fused, monkeypatch):
    """To the bit, whatever fits into one; a parameter without a gradient stays."""
    found = []
    for limit in (2**26, 100, 1):
        monkeypatch.setattr("dfq.optimizer.BUNDLE_BYTES", limit)
        rng = torch.Generator().manual_seed(0)
        parts = [torch.nn.Parameter(torch.randn(n, generator=rng)) for n in (20, 3, 40, 7, 9)]
        sizes = {part: torch.rand(len(part), generator=rng) for part in parts[1:]}
        groups = [{"params": parts[:2], "lr": 0.1}, {"params": parts[2:4], "lr": 0.2}, {"params": parts[4:], "lr": 0.3}]
        optimizer, untouched = ScaledAdam(groups, sizes, fused=fused), parts[3].detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            sum(part.square().sum() for part in parts if part is not parts[3]).backward()
            optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]
        assert torch.equal(parts[3], untouched)
        found.append(torch.cat([part.detach() for part in parts]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_step_keeps_what_one_bundle_was(monkeypatch):
    """Values of before: of the bundle, not of all parameters."""
    monkeypatch.setattr("dfq.optimizer.BUNDLE_BYTES", 4 * 1000)
    parts = [torch.nn.Parameter(torch.ones(1000)) for _ in range(8)]
    optimizer = ScaledAdam([{"params": parts, "lr": 0.1}], {part: torch.ones(1000) for part in parts})
    held, most, real = [0], [0], torch.Tensor.clone

    def counted(tensor, *args, **options):
        result = real(tensor, *args, **options)
        held[0] += result.numel()
        most[0] = max(most[0], held[0])
        weakref.finalize(result, lambda: held.__setitem__(0, held[0] - 1000))
        return result

    sum(part.square().sum() for part in parts).backward()
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "clone", counted)
    optimizer.step()
    assert 1000 <= most[0] <= 2000


def test_state_is_that_of_adam():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = ScaledAdam([{"params": [parameter], "lr": 0.1}], {parameter: torch.tensor([1.0, 2.0])})
    parameter.square().sum().backward()
    optimizer.step()
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.9, 0.8]))


def quadratic():
    """L = (theta - c) H (theta - c) / 2 of two parameters, its gradient at theta, and what gives the loss."""
    rng = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    hessian = root @ root.T / 6 + torch.eye(6, dtype=torch.float64)
    parts = [torch.nn.Parameter(torch.randn(n, generator=rng, dtype=torch.float64)) for n in (2, 4)]
    center = torch.randn(6, generator=rng, dtype=torch.float64)

    def loss():
        offset = torch.cat([p.detach() for p in parts]) - center
        return offset @ hessian @ offset / 2

    return parts, loss, hessian @ (torch.cat([p.detach() for p in parts]) - center)


def test_the_slope_along_random_directions_is_the_gradient_in_the_mean():
    """On a quadratic the difference is exact: g = <gradient, u z>, and E[g z] is the gradient by theta / u."""
    parts, loss, gradient = quadratic()
    units = torch.tensor([2.0, 0.5], dtype=torch.float64)
    groups = [{"params": [parts[0]], "lr": 0.3}, {"params": [parts[1]], "lr": 0.7}]
    optimizer = ZerothOrder(groups, {parts[0]: units}, eps=0.1)
    u = torch.cat([0.3 * units, torch.full((4,), 0.7, dtype=torch.float64)])
    before = [p.detach().clone() for p in parts]
    total, count = torch.zeros(6, dtype=torch.float64), 4000
    for seed in range(count):
        step = torch.cat([z for _, _, z in optimizer.direction(seed)])
        slope, mean = optimizer.slope(loss, seed)
        assert abs(slope - float(gradient @ step)) < 1e-9 * float(gradient.norm() * step.norm())
        total += slope * step / u / count
    expected = gradient * u
    # The variance of an entry of g z is |expected|^2 + its own square.
    assert (total - expected).abs().max() < 5 * float(expected.norm()) * (2 / count) ** 0.5
    for parameter, old in zip(parts, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=1e-9)
    assert mean > float(loss()) - 1


def test_descends_without_a_gradient_and_repeats_itself():
    found = []
    for _ in range(2):
        parts, loss, _ = quadratic()
        groups = [{"params": parts, "lr": 0.1}]
        optimizer = ZerothOrder(groups, {}, eps=0.1, rate=1.0, seed=3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 400)
        first = float(loss())
        for _ in range(400):
            optimizer.step(loss)
            scheduler.step()
        assert float(loss()) < 0.1 * first
        assert not optimizer.state, "nothing for each parameter"
        found.append(torch.cat([p.detach() for p in parts]))
    assert torch.equal(*found)


def test_goes_on_from_its_state():
    parts, loss, _ = quadratic()
    optimizer = ZerothOrder([{"params": parts, "lr": 0.1}], {}, seed=3)
    for _ in range(3):
        optimizer.step(loss)
    kept, state = [p.detach().clone() for p in parts], optimizer.state_dict()
    optimizer.step(loss)
    again, other_loss, _ = quadratic()
    for parameter, old in zip(again, kept, strict=True):
        parameter.data.copy_(old)
    other = ZerothOrder([{"params": again, "lr": 0.1}], {}, seed=3)
    other.load_state_dict(state)
    other.step(other_loss)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
