"""The parts of `tensorrt.plugin` that tests fill in or clear."""

from types import ModuleType
from typing import Any


def forget(trtp: ModuleType, namespace: str) -> None:
    from tensorrt.plugin import _lib, _tensor

    _tensor.SymIntExpr._exprBuilder = None  # left behind by a get_launch_params that failed

    for kept in (_lib.QDP_REGISTRY, _lib.QDP_CREATORS):
        for name in [name for name in kept if name.startswith(f"{namespace}::")]:
            del kept[name]
    trtp.op.__dict__.pop(namespace, None)


def descs(trt: ModuleType, shapes: list[tuple[int, ...]], types: list[str]) -> list[Any]:
    made = []
    for shape, kind in zip(shapes, types, strict=True):
        desc = trt.DynamicPluginTensorDesc()
        inner = trt.PluginTensorDesc()
        inner.dims, inner.type, inner.format = (
            trt.Dims(shape),
            getattr(trt.DataType, kind),
            trt.TensorFormat.LINEAR,
        )
        desc.desc, desc.min, desc.opt, desc.max = inner, inner.dims, inner.dims, inner.dims
        made.append(desc)
    return made


class Setter(dict[int, Any]):
    """Where TensorRT wants the numbers of a launch."""

    nbSymExprs = 0
