"""Random layer problems for the solvers on second moments, and independent computations to hold them against."""

import numpy as np
import torch

from dfq.algorithms._hessian import Grid, Problem
from dfq.algorithms._linear_algebra import damped
from dfq.quantization import choose_qparams, to_groups
from dfq.scheme import TensorScheme

SIGNED3, UNSIGNED3 = TensorScheme(3, True, "per_channel"), TensorScheme(3, False, "per_channel")
TENSOR = TensorScheme(3, True, "per_tensor")
GROUPS = TensorScheme(3, False, "per_group", 4)
TERNARY = TensorScheme(grid="ternary", symmetric=True, granularity="per_channel")
SHIFTED = TensorScheme(grid="ternary", granularity="per_channel")
SEQ = TensorScheme(2, True, "per_channel", grid="seq")
FP4 = TensorScheme(grid="fp4_e2m1", symmetric=True, granularity="per_channel")
MXFP4 = TensorScheme(grid="fp4_e2m1", symmetric=True, granularity="per_group", group_size=4, scale_format="e8m0")
NVFP4 = TensorScheme(grid="fp4_e2m1", symmetric=True, granularity="per_group", group_size=4, scale_format="e4m3")
SCHEMES = [SIGNED3, UNSIGNED3, TENSOR, GROUPS, TERNARY, SHIFTED, SEQ, FP4, MXFP4, NVFP4]


def ids(scheme):
    return f"{scheme.label}-{scheme.granularity}-{'' if scheme.symmetric else 'a'}symmetric"


def inputs(num_problems=2, num_inputs=12, num_columns=80, seed=0, dtype=torch.float64):
    """Correlated inputs [P, I, n] with a mean, as behind a ReLU: what makes rounding to nearest a bad idea."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_problems, num_inputs, num_inputs, generator=rng, dtype=dtype)
    x = mix @ torch.randn(num_problems, num_inputs, num_columns, generator=rng, dtype=dtype)
    return x.relu() + 0.1 * torch.randn(x.shape, generator=rng, dtype=dtype)


def grid_of(weight, scheme):
    """Min-max grids of a weight [P, O, I], clipped a little, so that some entries lie outside."""
    rows = weight.flatten(0, 1)
    if scheme.granularity == "per_tensor":
        rows = rows.reshape(1, -1)
    size = scheme.group_size or rows.shape[1]
    groups = to_groups(rows, 0, size)
    scale, zero_point = choose_qparams(groups.amin(-1).float() * 0.8, groups.amax(-1).float() * 0.8, scheme)
    scale = scale.double() if weight.dtype == torch.float64 else scale
    if scheme.granularity == "per_tensor":
        return Grid(scheme, scale.view(1, 1, 1), zero_point.view(1, 1, 1))
    shape = (*weight.shape[:2], -1)
    repeats = size if scheme.group_size else 1
    return Grid(
        scheme,
        scale.view(shape).repeat_interleave(repeats, -1),
        zero_point.view(shape).repeat_interleave(repeats, -1),
    )


def problem(scheme=SIGNED3, num_problems=2, num_outputs=5, num_inputs=12, seed=0, damping=0.01, dtype=torch.float64):
    x = inputs(num_problems, num_inputs, seed=seed, dtype=dtype)
    rng = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(num_problems, num_outputs, num_inputs, generator=rng, dtype=dtype)
    return Problem(weight, damped(2 / x.shape[-1] * x @ x.mT, damping), grid_of(weight, scheme))


def loss(weight, values, hessian):
    """tr((W - Q) H (W - Q)^T) in NumPy, over all problems."""
    return sum(
        float(np.trace((w - q) @ h @ (w - q).T))
        for w, q, h in zip(weight.double().numpy(), values.double().numpy(), hessian.double().numpy(), strict=True)
    )


def levels(scheme):
    """All levels of a grid of scale 1, zero point 0 (for a shifted grid: of any), written down by hand."""
    if scheme.grid == "fp4_e2m1":
        return np.array(sorted({s * v for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}))
    codes = np.arange(scheme.quant_min, scheme.quant_max + 1)
    return codes + 0.5 if scheme.grid == "seq" else codes


def all_levels(grid, shape):
    """The levels [P, O, I, K] that each entry of a weight of ``shape`` may take."""
    scale, zero_point = (t.expand(shape).double().numpy()[..., None] for t in (grid.scale, grid.zero_point))
    return (levels(grid.scheme) - zero_point) * scale


def is_on_grid(values, grid):
    """Every entry one of its levels, up to rounding errors of float32."""
    distance = np.abs(all_levels(grid, values.shape) - values.double().numpy()[..., None]).min(-1)
    return bool((distance < 1e-5).all())
