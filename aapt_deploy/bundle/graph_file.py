"""Read and write ONNX graphs on disk.

Protobuf ends at 2 GB, so large weights are in one file beside the graph, `<name>.onnx.data`. A
graph may be hollow: some of its constants have a name, a type and a shape, and no value. `write`
fills them in one by one while writing, so a graph may be larger than the memory.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper

from aapt_deploy.bundle.bundle import STRANGER
from aapt_deploy.bundle.signature import GraphSignature, Tensors
from aapt_deploy.errors import BundleError

INLINE_LIMIT_BYTES = 1_800_000_000  # of a finished graph
HOLLOW_LIMIT_BYTES = 100_000_000  # of hollow constants: above, they go beside the graph
SMALL_BYTES = 1024  # a constant that stays in the graph
ALIGNMENT = 4096  # of a constant in the file beside the graph: a page, so that it can be mapped

UNREADABLE = "export the checkpoint again with this version"
ITEM_BYTES: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT8E4M3FN: 1}

Bytes = NDArray[np.uint8]


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a whole graph."""
    external = model.ByteSize() > INLINE_LIMIT_BYTES
    onnx.save_model(
        model, path, save_as_external_data=external,
        all_tensors_to_one_file=True, location=f"{path.name}.data",
    )  # fmt: skip


def load_model(path: Path, listed_bytes: int | None = None) -> onnx.ModelProto:
    """Read a whole graph, its external data included. Raises what `read_structure` raises."""
    model = read_structure(path, listed_bytes)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise _unreadable(path, error) from None
    return model


def read_structure(path: Path, listed_bytes: int | None = None) -> onnx.ModelProto:
    """Read a graph without its external data, once `refuse_outside` has let it pass.

    Raises BundleError if the file is not an ONNX graph or may read outside its own weights.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not model.graph.node:
        raise BundleError(f"graph {path} holds no graph", UNREADABLE)
    refuse_outside(model, path, listed_bytes)
    return model


def _unreadable(path: Path, error: Exception) -> BundleError:
    """Describe any error: types of protobuf and onnx differ from release to release."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BundleError(f"graph {path} cannot be read: {reason}", UNREADABLE)


def refuse_other(model: onnx.ModelProto, signature: GraphSignature, path: Path, hint: str) -> None:
    """Raise BundleError with `hint` unless `model` has the tensors of `signature`."""
    inputs, outputs = _tensors(model.graph.input), _tensors(model.graph.output)
    state_leaves = signature.name == "decoder"  # a generator's blocks are committed
    if wrong := signature.misfit(inputs, outputs, state_leaves):
        raise BundleError(f"graph {path} is not the {signature.name} of its bundle: {wrong}", hint)


def _tensors(values: Iterable[onnx.ValueInfoProto]) -> Tensors:
    types = {value.name: value.type.tensor_type for value in values}
    return {
        name: (_dtype(kind.elem_type), [dim.dim_value for dim in kind.shape.dim])
        for name, kind in types.items()
    }


def _dtype(elem_type: int) -> str:
    """Return NumPy's name, such as float32; ONNX's number for a type that NumPy lacks."""
    known = elem_type in onnx.helper.get_all_tensor_dtypes()
    return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type)) if known else f"type {elem_type}"


def refuse_outside(model: onnx.ModelProto, path: Path, listed_bytes: int | None = None) -> None:
    """Raise BundleError unless every external constant is in the file beside the graph.

    A graph may come from a stranger, and its readers open any file that it names. So only plain
    initializers may be external. Each must be in `<name>.onnx.data` beside `path`, a regular
    file, inside its size and inside `listed_bytes`, its size in the manifest (None if there is
    none).
    """
    beside = path.with_name(f"{path.name}.data")
    if any(map(_hides, _attributes(model))) or model.graph.sparse_initializer:
        raise BundleError(f"graph {path} hides constants inside its nodes", STRANGER)
    for tensor in filter(_is_external, model.graph.initializer):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") != beside.name:
            found = where.get("location", "")
            text = f"keeps {tensor.name!r} in {found!r}, not in {beside.name!r} beside it"
            raise BundleError(f"graph {path} {text}", STRANGER)
        if beside.is_symlink() or not beside.is_file():
            hint = "export the checkpoint again"
            raise BundleError(f"weights {beside} are missing or a link", hint)
        size = min(beside.stat().st_size, sys.maxsize if listed_bytes is None else listed_bytes)
        offset, length = (where.get(key, "0") for key in ("offset", "length"))
        numbers = all(re.fullmatch("[0-9]{1,19}", number) for number in (offset, length))
        if not numbers or int(offset) + int(length) > size:
            name = tensor.name
            raise BundleError(f"weights {beside} end before {name!r}: {size} bytes", STRANGER)


def _attributes(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return (attribute for node in nodes for attribute in node.attribute)


def _hides(attribute: onnx.AttributeProto) -> bool:
    """Whether `attribute` has a subgraph, a sparse tensor or an external one."""
    parts = ("g", "sparse_tensor")
    if any(map(attribute.HasField, parts)) or attribute.graphs or attribute.sparse_tensors:
        return True
    return any(map(_is_external, (attribute.t, *attribute.tensors)))


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def hollow(name: str, data_type: int, dims: list[int]) -> TensorProto:
    """Return a constant without a value."""
    external = TensorProto.EXTERNAL
    return TensorProto(name=name, data_type=data_type, dims=dims, data_location=external)


def hollows(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield the constants of `model` that have no value yet."""
    external = TensorProto.EXTERNAL
    constants = model.graph.initializer
    return (t for t in constants if t.data_location == external and not t.external_data)


def turn_weights(model: onnx.ModelProto) -> set[str]:
    """Remove the Transpose between a hollow float matrix and the MatMul that reads it.

    Returns the names of these matrices, which are to be written [in, out]. ONNX Runtime
    quantises a MatMul only if its weight is a constant. FP8 weights keep their Transpose: FP8
    products read [out, in] behind DequantizeLinear.
    """
    readers = Counter(name for node in model.graph.node for name in node.input)
    floats = {
        t.name: t for t in hollows(model) if t.data_type == TensorProto.FLOAT and len(t.dims) == 2
    }
    turned = {
        node.output[0]: (node, floats[node.input[0]])
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in floats and readers[node.input[0]] == 1
    }
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in turned:
                node.input[index] = turned[name][1].name
    for node, weight in turned.values():
        model.graph.node.remove(node)
        weight.dims[:] = [*reversed(weight.dims)]
    kept = [value for value in model.graph.value_info if value.name not in turned]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return {weight.name for _, weight in turned.values()}


def write(model: onnx.ModelProto, path: Path, read: Callable[[str], Bytes]) -> None:
    """Write a graph; `read` returns the bytes of each hollow constant, in turn.

    `model` stays small if its constants are written beside it.
    """
    todo = list(hollows(model))
    inline = sum(_bytes(tensor) for tensor in todo) <= HOLLOW_LIMIT_BYTES
    beside = path.with_name(f"{path.name}.data")
    with contextlib.nullcontext() if inline else beside.open("wb") as file:
        for tensor in todo:
            data = read(tensor.name)
            assert data.nbytes == _bytes(tensor), f"{tensor.name}: {data.nbytes=} {tensor.dims=}"
            if file is None or data.nbytes <= SMALL_BYTES:
                tensor.ClearField("data_location")
                tensor.raw_data = data.tobytes()
                continue
            file.seek(-file.tell() % ALIGNMENT, 1)
            where = {"location": beside.name, "offset": file.tell(), "length": data.nbytes}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(data.data)
    if inline:
        save_model(model, path)
    else:
        path.write_bytes(model.SerializeToString())


def _bytes(tensor: TensorProto) -> int:
    return ITEM_BYTES[tensor.data_type] * int(np.prod(tensor.dims, dtype=np.int64))
