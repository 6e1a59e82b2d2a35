"""ScaledAdam: Adam in other units."""

import torch

from dfq.optimizer import ScaledAdam


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


def test_state_is_that_of_adam():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = ScaledAdam([{"params": [parameter], "lr": 0.1}], {parameter: torch.tensor([1.0, 2.0])})
    parameter.square().sum().backward()
    optimizer.step()
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.9, 0.8]))
