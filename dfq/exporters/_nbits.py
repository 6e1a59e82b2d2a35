"""Products with weights of 4 bits as ONNX Runtime's own operator, ``com.microsoft.MatMulNBits``.

::

    codes [K, N] int4 ─ DequantizeLinear(axis=0, block_size) ─ MatMul          what the translator's graph has become
    B uint8 [N, K / block, block / 2], scales [N K / block], zero_points uint8 [N, ceil(K / block / 2)] ─ MatMulNBits

Two codes lie in a byte, the first in the low half, signed ones moved up by 8, which is the zero point where none is
given; rows with a scale each are blocks with the same. Float zero points, which come as an offset that is subtracted
behind DequantizeLinear, are float32 [N K / block] there. Computed in float (``accuracy_level`` 1): inputs are not
rounded on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

UINT4, INT4 = 21, 22  # onnx.TensorProto.DataType, without an import of onnx
SMALLEST_BLOCK = 16
DOMAIN = "com.microsoft"


def to_matmul_nbits(model: Any) -> int:
    """Rewrite every product with blocks of 4-bit weights, in place; returns how many there were."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    nodes, products = [], 0
    replaced: set[str] = set()
    for node in graph.node:
        nodes.append(node)
        found = _weight(node, makers, tensors) if node.op_type == "MatMul" else None
        if found is None:
            continue
        codes, scales, zeros, block, behind = found
        replaced.update(name for old in behind for name in old.output)
        rows, columns = codes.shape
        stem = node.output[0]
        inputs = [
            (f"{stem}_weight", _pairs(codes).reshape(rows, columns // block, block // 2)),
            (f"{stem}_scales", np.ascontiguousarray(scales, np.float32).reshape(-1)),
        ]
        if zeros.dtype != np.uint8:
            inputs.append((f"{stem}_zero_points", np.ascontiguousarray(zeros, np.float32).reshape(-1)))
        elif (zeros != 8).any():
            padded = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)), constant_values=8)
            inputs.append((f"{stem}_zero_points", _pairs(padded)))
        for name, array in inputs:
            graph.initializer.append(numpy_helper.from_array(array, name))
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], *(name for name, _ in inputs)],
            list(node.output),
            domain=DOMAIN,
            K=columns,
            N=rows,
            bits=4,
            block_size=block,
            accuracy_level=1,
        )
        nodes[-1] = product
        products += 1
    if products:
        whole = type(graph)(node=nodes)  # copies: the list of nodes is not changed while nodes of it are looked at
        del graph.node[:]
        graph.node.extend(whole.node)
        _drop_unused(graph, replaced)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return products


def _weight(
    node: Any, makers: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, list[Any]] | None:
    """Codes [N, K], scales and zero points [N, K / block] of a product's second factor, the block, and the nodes that
    make the factor; None: no such.

    Rows of one scale are cut into blocks that share it.
    """
    from onnx import numpy_helper

    behind, maker = [], makers.get(node.input[1])
    while maker is not None and maker.op_type in ("Transpose", "Reshape", "Sub"):
        behind.append(maker)
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in tensors:
        return None
    kinds = [part.op_type for part in behind]
    if kinds not in ([], ["Transpose"], ["Transpose", "Sub"], ["Reshape", "Sub", "Reshape"]):
        return None
    transposed = kinds[:1] == ["Transpose"]
    offset_tensor = next((tensors.get(part.input[1]) for part in behind if part.op_type == "Sub"), None)
    if "Sub" in kinds and offset_tensor is None:
        return None
    settings = {a.name: a.i for a in maker.attribute}
    codes_tensor = tensors[maker.input[0]]
    if settings.get("axis") != 0 or codes_tensor.data_type not in (INT4, UINT4) or len(codes_tensor.dims) != 2:
        return None
    offset, block = 8 if codes_tensor.data_type == INT4 else 0, settings.get("block_size", 0)
    codes, zeros = (_unsigned(tensor, offset) for tensor in (codes_tensor, tensors[maker.input[2]]))
    scales = numpy_helper.to_array(tensors[maker.input[1]])
    if offset_tensor is not None:
        offsets = numpy_helper.to_array(offset_tensor)
        if offsets.size != scales.size:
            return None
        zeros = zeros + offsets.reshape(scales.shape) / scales
    if block and not transposed:
        codes, zeros, scales = codes.T, zeros.T, scales.T
    elif transposed and not block and scales.ndim == 1:
        columns = codes.shape[1]
        block = next((size for size in (128, 64, 32, 16) if columns % size == 0), 0)
        if block:
            zeros, scales = (np.repeat(part[:, None], columns // block, 1) for part in (zeros, scales))
    if block < SMALLEST_BLOCK or block & (block - 1) or codes.shape[1] % block:
        return None
    return codes, scales, zeros, block, [*behind, maker]


def _unsigned(tensor: Any, offset: int) -> np.ndarray:
    """The codes of an int4 or uint4 tensor with raw data, moved up by ``offset``."""
    raw = np.frombuffer(tensor.raw_data, np.uint8)
    codes = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: int(np.prod(tensor.dims))].reshape(tuple(tensor.dims))
    return (codes + offset) & 15


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes of a row [R, C] in a byte [R, C / 2], the first in the low half."""
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)


def _drop_unused(graph: Any, replaced: set[str]) -> None:
    """Nodes whose outputs are ``replaced``, if nobody reads them any more, and initializers that nobody reads."""
    read, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if read & set(node.output) or not replaced.issuperset(node.output):
            kept.append(node)
            read.update(node.input)
    whole = type(graph)(node=kept[::-1])
    del graph.node[:]
    graph.node.extend(whole.node)
    whole = type(graph)(initializer=[tensor for tensor in graph.initializer if tensor.name in read])
    del graph.initializer[:]
    graph.initializer.extend(whole.initializer)
