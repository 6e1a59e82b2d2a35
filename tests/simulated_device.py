"""A GPU that is not there: its tensors lie in the memory of the CPU, and say that they do not.

As on a real one, an operation on tensors of two devices is an error and a tensor has to come back before NumPy sees
it; as on Apple's there is no float64. torch's kernels for the CPU compute, so that results are those of the CPU. What
takes a device and forgets one tensor, or doubles one, is found on any machine.

``python simulated_device.py NAME ...`` runs scenarios of ``test_simulated_device.py``, in a process of its own: a
device is registered once, for good.
"""

import importlib
import sys
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "simulated"
aten = torch.ops.aten
TAKE_BOTH = {aten._to_copy.default, aten.copy_.default}  # tensors of two devices
INDEXED_FROM_CPU = {  # by tensors of the CPU as well
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``inner`` is what it holds."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")
        where = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **where, dtype=inner.dtype, device=torch.device(NAME, 0), requires_grad=False
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, Elsewhere) for x in given]
    if any(there) and func not in TAKE_BOTH | INDEXED_FROM_CPU:
        here = [x for x in given if not isinstance(x, Elsewhere) and x.dim()]
        if here:
            raise RuntimeError(f"{func}: tensors of {NAME}:0 and a tensor {list(here[0].shape)} of the cpu")
    wanted = kwargs.get("device")
    to = None if wanted is None else torch.device(wanted).type
    if to == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*inner(args), **inner(kwargs))
    goes = to == NAME if to is not None else isinstance(args[0], Elsewhere) if func in TAKE_BOTH else any(there)
    if not goes:
        return result
    result = pytree.tree_map_only(torch.Tensor, Elsewhere, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if any(there) and to is None else result


def inner(values):
    return pytree.tree_map_only(Elsewhere, lambda x: x.inner, values)


def register():
    """Make ``torch.device("simulated")`` known; the returned library holds what torch asks of it below Python."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")

    def empty(size, *, dtype=None, memory_format=None, **_):
        return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format))

    def empty_strided(size, stride, *, dtype=None, **_):
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, _non_blocking=False):
        inner(target).copy_(inner(source))
        return target

    for name, kernel in [("empty.memory_format", empty), ("empty_strided", empty_strided), ("_copy_from", copy_from)]:
        library.impl(name, kernel, "PrivateUse1")
    return library


def let_in():
    """dfq takes the device, and knows what it lacks."""
    import dfq.precision
    import dfq.teacher

    dfq.precision.WITHOUT_FLOAT64 = (*dfq.precision.WITHOUT_FLOAT64, NAME)
    before = dfq.teacher.resolve_device

    def resolve_device(device="auto"):
        return torch.device(NAME, 0) if str(device).startswith(NAME) else before(device)

    for module in [module for name, module in sys.modules.items() if name.startswith("dfq")]:
        if getattr(module, "resolve_device", None) is before:
            module.resolve_device = resolve_device


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    library = register()
    scenarios = importlib.import_module("test_simulated_device")
    let_in()
    with SimulatedDevice():
        for scenario in sys.argv[1:]:
            name, _, words = scenario.partition(":")
            getattr(scenarios, name)(*filter(None, words.split(",")))
            print("done", scenario, flush=True)
