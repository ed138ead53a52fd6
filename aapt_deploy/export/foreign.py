"""Read the weights of published files, one tensor at a time.

A file is .safetensors, a PyTorch file (only tensors are unpickled, and its pages are mapped), or a
folder of .safetensors, with an index or without. Names lose what training wrappers put before
them. Nothing is held in memory that nobody asked for.
"""

import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aapt_deploy.errors import CheckpointError

# Dicts of weights that a PyTorch file may have, the one to take first. EMA weights are what the
# authors publish results of.
INSIDE = ("generator_ema", "generator", "generator_lora", "model", "state_dict")
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
OUTER = ("base_model.model.", "module.", "model.")
INDEX = "*.safetensors.index.json"
FIX = "download the file again, and check its size"


class Lazy(NamedTuple):
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Foreign(NamedTuple):
    """The weights of one published file."""

    path: Path
    files: list[Path]  # what was read, the shards of a folder one by one
    inside: str  # the dict that was taken; "" if there is none
    tensors: dict[str, Lazy]


def open_foreign(path: Path) -> Foreign:
    """Open a file or a folder of weights.

    Raises CheckpointError if it is missing or damaged, or has other things than tensors.
    """
    try:
        if path.is_dir():
            files, inside = _shards(path), ""
            pairs = [pair for file in files for pair in _safetensors(file).items()]
            if len(found := dict(pairs)) < len(pairs):
                twice = f"weights {path}: several of its files have the same tensors"
                raise CheckpointError(twice, "leave only the files of one checkpoint there")
        elif path.suffix == ".safetensors":
            files, inside, found = [path], "", _safetensors(path)
        else:
            files = [path]
            inside, found = _pickled(path)
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or "no reason").splitlines()[0]
        raise CheckpointError(f"weights {path} cannot be read: {reason}", FIX) from None
    except pickle.UnpicklingError:
        unsafe = f"weights {path} have more than tensors inside, and are not unpickled"
        raise CheckpointError(unsafe, "save their tensors with safetensors") from None
    return Foreign(path, files, inside, {bare_name(name): lazy for name, lazy in found.items()})


def bare_name(name: str) -> str:
    """Return the name without the prefixes of FSDP, PEFT and wrapper classes."""
    name = WRAPPERS.sub("", name)
    for prefix in OUTER:
        name = name.removeprefix(prefix)
    return name


def _shards(folder: Path) -> list[Path]:
    """Return the .safetensors files of a folder, by its index if it has one."""
    indices = sorted(folder.glob(INDEX))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"weights {folder}: no .safetensors file is there", FIX)
        return files
    listed = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
    if strange := [name for name in listed if not isinstance(name, str) or Path(name).name != name]:
        outside = f"index {indices[0]} names {strange[0]!r}, outside its folder"
        raise CheckpointError(outside, "the file is not to be trusted")
    return [folder / name for name in sorted(listed)]


def _safetensors(path: Path) -> dict[str, Lazy]:
    file = safe_open(path, framework="pt")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: Lazy(shape, partial(file.get_tensor, name)) for name, shape in shapes.items()}


def _pickled(path: Path) -> tuple[str, dict[str, Lazy]]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        loaded = torch.load(path, map_location="cpu", weights_only=True)  # older than zip files
    dicts = loaded if isinstance(loaded, dict) else {}
    inside = next((name for name in INSIDE if isinstance(dicts.get(name), dict)), "")
    weights = dicts[inside] if inside else dicts
    found = {
        str(name): Lazy(tuple(value.shape), partial(_itself, value))
        for name, value in weights.items()
        if isinstance(value, Tensor)
    }
    if not found:
        there = ", ".join(map(str, list(dicts)[:8])) or type(loaded).__name__
        raise CheckpointError(f"weights {path} have no tensors by name: {there}", FIX)
    return inside, found


def _itself(tensor: Tensor) -> Tensor:
    return tensor
