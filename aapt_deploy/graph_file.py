"""ONNX graphs on disk. Protobuf ends at 2 GB; above that, weights go to one file beside the graph."""

from pathlib import Path

import onnx

INLINE_LIMIT_BYTES = 1_800_000_000


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph; large weights go to `<name>.onnx.data` beside it."""
    external = model.ByteSize() > INLINE_LIMIT_BYTES
    onnx.save_model(model, path, save_as_external_data=external, all_tensors_to_one_file=True, location=f"{path.name}.data")
