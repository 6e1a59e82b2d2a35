"""What the translator's ONNX graph becomes before it is a file: what ONNX Runtime has integer kernels for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import dfq
from dfq.errors import UserError
from dfq.exporters._nbits import INT4, UINT4, to_matmul_nbits
from dfq.student import CODES

UINT8, INT8 = 2, 3  # onnx.TensorProto.DataType, without an import of onnx
INTEGERS = (UINT8, INT8, UINT4, INT4)
STATE = "network."  # what names of the network's tensors start with
OWN_CODES = ".weight_quantizer.codes"


def serialize(
    model: Any,
    metadata: Mapping[str, str],
    low_bits: Mapping[str, int | None] | None = None,
    matmul_nbits: bool = False,
) -> bytes:
    """The model as a file: what ONNX Runtime needs, short names, no traces of the machine that made it.

    Args:
        low_bits: layers with weights of at most 4 bits → group size or None: they become int4 (opset 21).
        matmul_nbits: products with groups of them are ONNX Runtime's own operator.
    """
    _pool_means(model.graph)
    for name, group_size in (low_bits or {}).items():
        _take_four_bits(model.graph, f"{STATE}{name}{OWN_CODES}".replace("..", "."), group_size)
    if matmul_nbits and not to_matmul_nbits(model):
        raise UserError(
            "got exporter.matmul_nbits=true and a network without a product of matrices with 4-bit weights",
            "linear layers with weights in groups of 16, 32, 64, 128, ...",
            "set exporter.matmul_nbits=false",
        )
    _separate_weights(model.graph)
    _shorten(model)
    model.producer_name, model.producer_version = "dfq", dfq.__version__
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    try:
        return model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf has a different one in each implementation
        raise UserError("got a network of more than 2 GB", "what fits one ONNX file") from error


def _pool_means(graph: Any) -> None:
    """A mean over height and width that keeps them is a global average pool, which has an integer kernel."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in [*graph.value_info, *graph.input, *graph.output]
    }
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in tensors:
            continue
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        axes = numpy_helper.to_array(tensors[node.input[1]]).tolist()
        rank = ranks.get(node.input[0])
        if keeps and rank == 4 and sorted(axis % rank for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            del node.input[1:]


def _take_four_bits(graph: Any, codes_name: str, group_size: int | None) -> None:
    """Store codes as int4 or uint4; of groups as blocks, next to a MatMul as [I, O]: what becomes one MatMulNBits.

    ::

        codes [O G, K] ─ DequantizeLinear ─ Reshape [O, I] ─ Transpose ─ MatMul
        codes [I, O] int4 ─ DequantizeLinear(axis=0, block_size=K) ─ MatMul

    The offset of float zero points, [O G, 1], is subtracted behind DequantizeLinear, before and after.
    """
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == codes_name]
    if not found or codes_name not in tensors:
        return  # the translator merged it with an equal one
    codes = numpy_helper.to_array(tensors[codes_name])
    scale, zero_point = (numpy_helper.to_array(tensors[name]) for name in list(found[0].input)[1:3])
    if group_size is None:
        tensors[codes_name].CopyFrom(_four_bits(codes_name, codes))
        for node in found:
            node.input[2] = _add(
                graph, _four_bits(f"{node.output[0]}_zero_point", np.broadcast_to(zero_point, scale.shape))
            )
        return
    readers = {name: [node for node in graph.node if name in node.input] for name in _outputs(graph)}
    for node in found:
        path = [node]
        offset = None
        while len(readers[path[-1].output[0]]) == 1:
            reader = readers[path[-1].output[0]][0]
            if len(path) == 1 and reader.op_type == "Sub" and reader.input[1] in tensors:
                offset = numpy_helper.to_array(tensors[reader.input[1]])
            elif reader.op_type not in ("Reshape", "Transpose"):
                break
            path.append(reader)
        users = readers[path[-1].output[0]]
        shaping = [inner for inner in path[1:] if inner.op_type != "Sub"]
        kinds = [inner.op_type for inner in shaping]
        channels = _channels(tensors, shaping)
        by_channel = [array.reshape(channels, -1) for array in (codes, scale, zero_point)] if channels else []
        product = users[0] if len(users) == 1 and channels and len(node.output) == 1 else None
        if product is not None and product.op_type == "MatMul" and kinds == ["Reshape", "Transpose"]:
            arrays, axis, last = [array.T for array in by_channel], 0, path[-1].output[0]
        elif product is not None and _is_linear(product, tensors) and kinds == ["Reshape"]:
            arrays, axis, last = [array.T for array in by_channel], 0, path[-1].output[0]
            _gemm_to_matmul(graph, tensors, product)
        elif channels and kinds[:1] == ["Reshape"] and offset is None:  # a convolution: [O, I K K] in blocks, its shape
            arrays, axis, last = by_channel, 1, node.output[0]
        else:
            continue
        stem = node.output[0]
        inputs = [
            _add(graph, _four_bits(f"{stem}_codes", arrays[0])),
            _add(graph, numpy_helper.from_array(np.ascontiguousarray(arrays[1]), f"{stem}_scale")),
            _add(graph, _four_bits(f"{stem}_zero_point", arrays[2])),
        ]
        output = last if offset is None else f"{stem}_blocks"
        new = [helper.make_node("DequantizeLinear", inputs, [output], axis=axis, block_size=group_size)]
        if offset is not None:
            new += _subtract(graph, output, offset.reshape(channels, -1).T, group_size, last)
        for old in path if last != node.output[0] else [node]:
            position = list(graph.node).index(old)
            graph.node.remove(old)
        for added in reversed(new):
            graph.node.insert(position, added)


def _subtract(graph: Any, values: str, offset: np.ndarray, group_size: int, output: str) -> list[Any]:
    """Nodes that subtract ``offset`` [G, O] from ``values`` [I, O], in groups along I."""
    from onnx import helper, numpy_helper

    groups, channels = offset.shape
    arrays = {
        f"{values}_groups": np.array([groups, group_size, channels]),
        f"{values}_offset": np.ascontiguousarray(offset[:, None]),
        f"{values}_whole": np.array([groups * group_size, channels]),
    }
    names = [_add(graph, numpy_helper.from_array(array, name)) for name, array in arrays.items()]
    steps = [values, f"{values}_grouped", f"{values}_shifted", output]
    kinds = ("Reshape", "Sub", "Reshape")
    return [helper.make_node(kind, [steps[i], names[i]], [steps[i + 1]]) for i, kind in enumerate(kinds)]


def _outputs(graph: Any) -> list[str]:
    return [name for node in graph.node for name in node.output]


def _channels(tensors: Mapping[str, Any], shaping: list[Any]) -> int:
    """The number of output channels of a weight: what the Reshape behind its codes has first; 0 if there is none."""
    from onnx import numpy_helper

    shape = tensors.get(shaping[0].input[1]) if shaping and shaping[0].op_type == "Reshape" else None
    return 0 if shape is None else int(numpy_helper.to_array(shape)[0])


def _is_linear(node: Any, tensors: Mapping[str, Any]) -> bool:
    """A Gemm whose bias, if it has one, is a constant."""
    return node.op_type == "Gemm" and all(name in tensors for name in list(node.input)[2:])


def _gemm_to_matmul(graph: Any, tensors: Mapping[str, Any], gemm: Any) -> None:
    """x W^T + b as MatMul and Sub of -b; W comes transposed from now on.

    Not Add: ONNX Runtime would make a Gemm of it again before it looks for products with weights of few bits.
    """
    from onnx import helper, numpy_helper

    position = list(graph.node).index(gemm)
    output, inputs = gemm.output[0], list(gemm.input)
    product = f"{output}_product" if len(inputs) > 2 else output
    nodes = [helper.make_node("MatMul", inputs[:2], [product])]
    if len(inputs) > 2:
        bias = -numpy_helper.to_array(tensors[inputs[2]])
        negative = _add(graph, numpy_helper.from_array(bias, f"{output}_negative_bias"))
        nodes.append(helper.make_node("Sub", [product, negative], [output]))
    graph.node.remove(gemm)
    for node in reversed(nodes):
        graph.node.insert(position, node)


def _add(graph: Any, tensor: Any) -> str:
    graph.initializer.append(tensor)
    return tensor.name


def _four_bits(name: str, codes: np.ndarray) -> Any:
    """int4, or uint4 if ``codes`` are unsigned: two in a byte, the first in the low half."""
    from onnx import TensorProto

    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    packed = (flat[::2] | (flat[1::2] << 4)).astype(np.uint8)
    kind = INT4 if codes.dtype == np.int8 else UINT4
    return TensorProto(name=name, data_type=kind, dims=codes.shape, raw_data=packed.tobytes())


def _separate_weights(graph: Any) -> None:
    """Give every DequantizeLinear of a weight a zero point of its own; weights that are read twice become uint8.

    The exporter merges equal tensors and equal nodes, so that it is only known here who shares what.
    """
    from onnx import numpy_helper

    graphs = list(_graphs(graph))
    nodes = [node for inner in graphs for node in inner.node]
    reads = Counter(name for node in nodes for name in node.input)
    reads.update(output.name for inner in graphs for output in inner.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        codes = tensors[node.input[0]]
        if codes.data_type in (INT4, UINT4):
            continue  # no kernel that takes them is rewritten
        zero_point = numpy_helper.to_array(tensors[node.input[2]])
        if max(reads[codes.name], reads[node.output[0]]) > 1 and zero_point.dtype == np.int8:
            zero_point = _unsigned(zero_point)
            if codes.data_type == INT8:  # not yet done by another reader
                codes.CopyFrom(numpy_helper.from_array(_unsigned(numpy_helper.to_array(codes)), codes.name))
        reads[node.input[2]] -= 1
        node.input[2] = f"{node.output[0]}_zero_point"
        graph.initializer.append(numpy_helper.from_array(zero_point, node.input[2]))
        reads[node.input[2]] = 1
    kept = [tensor for tensor in graph.initializer if reads[tensor.name]]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _unsigned(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) + 128).astype(np.uint8)


def _graphs(graph: Any) -> Iterator[Any]:
    """``graph`` and the graphs inside its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)


def _shorten(model: Any) -> None:
    """Drop stack traces, paths and intermediate shapes, and count values through; weights keep their names."""
    graph = model.graph
    short = {"": ""}  # an optional input that is not there
    for value in [*graph.input, *graph.output]:
        short[value.name] = value.name
    for tensor in graph.initializer:
        if tensor.name.startswith("network."):  # a tensor of the network's state
            name = tensor.name.removeprefix("network.")
            if "." in name:  # no other name has a dot
                short[tensor.name] = name.replace(".weight_quantizer.codes", CODES)

    def rename(name: str) -> str:
        return short.setdefault(name, f"v{len(short)}")

    for inner in _graphs(graph):
        inner.name = rename(inner.name)
        del inner.value_info[:], inner.metadata_props[:]
        for node in inner.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
            node.ClearField("name")
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]
        for value in [*inner.input, *inner.output, *inner.initializer]:
            value.name = rename(value.name)
            value.ClearField("doc_string")
            del value.metadata_props[:]
