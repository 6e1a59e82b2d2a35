"""What attention does in a forward: its maps and its outputs, layer by layer, whoever calculates them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfq.hooks import op_name
from dfq.sites import FUSED_ATTENTION, attention_probabilities

MASK = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # arguments behind query, key and value


class AttentionRecord(TorchFunctionMode):
    """While it is open: ``maps`` [N, H, T, S] of each attention in order, and ``outputs`` [N, H, T, E].

    Maps of torch's fused attention are calculated from its arguments, unless ``with_maps`` is false. Otherwise they are
    softmax outputs of four dimensions, and the product behind each gives the output.
    """

    def __init__(self, with_maps: bool = True):
        super().__init__()
        self.with_maps = with_maps
        self.maps: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.open = False  # a map whose product is still to come

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = op_name(func)
        if name == FUSED_ATTENTION:
            given = dict(zip(("query", "key", "value", *MASK), args, strict=False)) | kwargs
            if self.with_maps:
                known = {key: given[key] for key in MASK if key in given and key != "dropout_p"}
                self.maps.append(attention_probabilities(given["query"], given["key"], **known))
            self.outputs.append(result)
        elif name == "softmax" and isinstance(result, Tensor) and result.dim() == 4:
            self.maps.append(result)
            self.open = True
        elif name in ("matmul", "bmm") and self.open:
            self.outputs.append(result)
            self.open = False
        return result
