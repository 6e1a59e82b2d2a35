"""What attention gives each patch, found by following values: no class of a network is known here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dfq.generators._precision import as_float, full_precision
from dfq.hooks import evaluation_mode, op_name, tensors_in
from dfq.losses.patch_similarity import gaussian_entropy, kernel_entropy, patch_similarities
from dfq.modules import PRODUCTS
from dfq.sites import FUSED_ATTENTION, MOVING
from dfq.teacher import InputSpec, Teacher

MULTI_HEAD = "multi_head_attention_forward"  # nn.MultiheadAttention, which hides what is inside
MIXING = {"linear", "conv2d"}  # of heads, between softmax and values (talking heads)
FEWEST_PATCHES = 3  # whose similarities differ


class PatchTokens(TorchFunctionMode):
    """Calls ``found`` with the tokens [R, L, C] of patches after every product of attention and values.

    That product is ``scaled_dot_product_attention``, or a product of two values that depend on the image, one of them
    out of a softmax. Heads are put side by side, as the projection behind them reads them. Tokens that were put beside
    the patches and do not depend on the image (class, distillation, registers) are left out. Each image has R / N rows,
    one after the other: more than one where attention is within windows.

    The images have to require a gradient: that tells what depends on them.
    """

    def __init__(self, found: Callable[[Tensor], object]):
        super().__init__()
        self.found = found
        self.probabilities: Any = WeakTensorKeyDictionary()
        self.patches: dict[int, Tensor] = {}  # number of tokens → which of them are patches, where not all are
        self.layouts: dict[int, list[tuple[int, bool]]] = {}  # the same, as lengths of what was put together

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op_name(func)
        if name == MULTI_HEAD:
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            if name in MOVING and self._is_probability(args[:1]):  # chunk, split, unbind
                for part in tensors_in(result):
                    self.probabilities[part] = True
        elif not result.requires_grad:
            pass
        elif name == "softmax" or (name in MOVING | MIXING and self._is_probability(args[:1])):
            self.probabilities[result] = True
        elif name in ("cat", "concat", "concatenate"):
            self._note_other_tokens(list(tensors_in(args[:1])), result, *args[1:], **kwargs)
        elif name == FUSED_ATTENTION:
            self._take(result)
        elif name in PRODUCTS:
            operands = list(tensors_in(args))
            which = [self._is_probability([operand]) for operand in operands]
            if len(operands) == 2 and all(operand.requires_grad for operand in operands) and any(which):
                self._take(result if which[0] else result.mT)  # values @ attention: tokens are the columns
        return result

    def _is_probability(self, values: Sequence) -> bool:
        return any(isinstance(value, Tensor) and value in self.probabilities for value in values)

    def _note_other_tokens(self, parts: list[Tensor], tokens: Tensor, dim: int = 0, **named: Any) -> None:
        """Remember which of the ``tokens`` that were put together come from the image, if [N, L, C] along L."""
        dim = named.get("dim", named.get("axis", dim))
        if tokens.dim() == 3 and dim in (1, -2) and not all(part.requires_grad for part in parts):
            layout = [(part.shape[dim], part.requires_grad) for part in parts]
            if self.layouts.get(tokens.shape[1]) != layout:  # once: what goes to the device is waited for
                is_patch = [own for length, own in layout for _ in range(length)]
                places = [place for place, own in enumerate(is_patch) if own]
                self.layouts[tokens.shape[1]] = layout
                self.patches[tokens.shape[1]] = torch.tensor(places, device=tokens.device)

    def _multi_head(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What goes into the output projection: the operation is given none, and the projection is made here."""
        call = inspect.signature(func).bind(*args, **kwargs).arguments
        weight, bias = call["out_proj_weight"], call["out_proj_bias"]
        call |= {"out_proj_weight": torch.eye(weight.shape[1]).to(weight), "out_proj_bias": None}
        tokens, *rest = func(**call)
        if tokens.requires_grad:
            self._take(tokens.transpose(0, 1) if tokens.dim() == 3 else tokens)  # [L, N, C]
        return (F.linear(tokens, weight, bias), *rest)

    def _take(self, x: Tensor) -> None:
        if x.dim() > 3:  # [..., heads, L, C]
            x = x.transpose(-3, -2).flatten(-2).flatten(0, -3)
        if x.dim() < 3:
            return
        patches = self.patches.get(x.shape[1])
        x = x.clone() if patches is None else x.index_select(1, patches)  # what follows may write into it
        if x.shape[1] >= FEWEST_PATCHES:
            self.found(x)


@contextmanager
def negative_entropies(num_samples: int, kernel_bandwidth: float | None = None) -> Iterator[list[Tensor]]:
    """A list to which every forward of ``num_samples`` images adds one scalar a block: minus the entropy of the
    similarities of its patches, by the Gaussian estimate, or by a kernel of that bandwidth.
    """
    found: list[Tensor] = []

    def measure(tokens: Tensor) -> None:
        with full_precision(tokens.device):
            similarities = patch_similarities(as_float(tokens))
            if len(tokens) % num_samples == 0:  # all windows of an image
                similarities = similarities.view(num_samples, -1)
            if kernel_bandwidth is None:
                found.append(-gaussian_entropy(similarities).mean())
            else:
                found.append(-kernel_entropy(similarities, kernel_bandwidth).mean())

    with PatchTokens(measure):
        yield found


def has_attention(teacher: Teacher) -> bool:
    """Whether a forward of the network has attention between patches."""
    if not isinstance(teacher.input_spec, InputSpec):
        return False
    found: list[bool] = []
    images = teacher.example(1).requires_grad_()
    with torch.enable_grad(), evaluation_mode(teacher.module), PatchTokens(lambda tokens: found.append(True)):
        teacher.module(images.clone())  # some networks write into their input
    return bool(found)
