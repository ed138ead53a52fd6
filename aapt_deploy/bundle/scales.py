"""Calibrated FP8 scales of one generator, and their file. NumPy only.

`scales.safetensors`, all float32. A code is e4m3(x / scale), saturating at +-448; x is about
code * scale:

    linear.<path>.input_scale    [1]       static, of the input of linear layer `generator.<path>`
    linear.<path>.weight_scale   [out]     of each output channel: each row of `weight` [out, in]
    attention.NN.q_scale         [H]       of layer NN (two digits), after QK-norm and RoPE
    attention.NN.k_scale         [H]       the text's keys included
    attention.NN.k_mean          [H, D]    subtracted from K before scaling; zeros: K is not centred
    attention.NN.v_scale         [H, D]    the text's values included

<path> is a path inside the generator, such as `visual.3.qkv` or `text.3.w1`. A linear layer without
scales stays as it is. Metadata is one JSON object of strings under the key `aapt`, so equal scales
are equal bytes: `format`, `profile` (name), `checkpoint_sha256`, `margin` (scale = margin * largest
magnitude / 448), `keep` (the rules, JSON) and `calibration` (JSON: what was run).

Nothing here touches weights; `models.fp8` applies scales to networks.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aapt_deploy.bundle.files import writing
from aapt_deploy.errors import InputError
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import Profile

FORMAT = "aapt-scales-1"
KEY = "aapt"  # of the file's metadata
FILE = "scales.safetensors"  # in a bundle
LARGEST_FILE_BYTES = 256 << 20
HINT = "calibrate again with: aapt export CKPT --precision fp8"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LinearScales:
    """One linear layer."""

    input_scale: Floats  # [1]
    weight_scale: Floats  # [out]


@dataclass(frozen=True)
class Scales:
    """Scales of one calibration: of the linear layers in FP8, and of every layer's attention."""

    linear: dict[str, LinearScales]  # by path inside the generator
    attention: list[hopper_fp8.Scales]  # by layer, for the plugin and the FP8 cache
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint_sha256(self) -> str:
        return self.metadata.get("checkpoint_sha256", "")


def save(scales: Scales, path: Path) -> None:
    """Write `scales`. Raises OutputError."""
    tensors: dict[str, Floats] = {}
    for name, linear in scales.linear.items():
        tensors |= {f"linear.{name}.{key}": value for key, value in vars(linear).items()}
    for layer, attention in enumerate(scales.attention):
        tensors |= {f"attention.{layer:02d}.{key}": value for key, value in vars(attention).items()}
    contiguous = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    metadata = {KEY: json.dumps(scales.metadata | {"format": FORMAT}, sort_keys=True)}
    hint = "name a file in a folder that exists, with room for it"
    with writing(f"scales {path}", hint, SafetensorError):
        save_file(contiguous, path, metadata=metadata)


def load(path: Path, profile: Profile) -> Scales:
    """Read a scales file made for `profile`'s shape.

    Raises InputError if it is missing, damaged or of another format. Raises InputError if scales
    are misshapen, not positive or not finite.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes long")
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            names = file.keys()  # it is not a dict
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"scales {path} cannot be read: {error}", HINT) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"scales {path} is not of format {FORMAT}", HINT)
    try:
        return _parse(tensors, metadata, profile)
    except ValueError as error:
        what = f"scales {path} does not fit profile {profile.name}"
        raise InputError(f"{what}: {error}", HINT) from None


def _parse(tensors: dict[str, Any], metadata: dict[str, str], profile: Profile) -> Scales:
    heads, head_dim = profile.model.heads, profile.head_dim
    channels = (heads, head_dim)
    shapes = {"q_scale": (heads,), "k_scale": (heads,), "k_mean": channels, "v_scale": channels}

    def take(name: str, shape: tuple[int, ...] | None) -> Floats:
        value = tensors.pop(name, None)
        if value is None:
            raise ValueError(f"{name} is missing")
        if value.dtype != np.float32 or (value.shape != shape if shape else value.ndim != 1):
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}")
        if not np.isfinite(value).all() or not (name.endswith("k_mean") or (value > 0).all()):
            raise ValueError(f"{name} is not finite and positive")
        return value  # type: ignore[no-any-return]

    def layer_scales(prefix: str) -> hopper_fp8.Scales:
        return hopper_fp8.Scales(**{k: take(f"{prefix}.{k}", shape) for k, shape in shapes.items()})

    def linear_scales(name: str) -> LinearScales:
        weight_scale = take(f"linear.{name}.weight_scale", None)
        return LinearScales(take(f"linear.{name}.input_scale", (1,)), weight_scale)

    attention = [layer_scales(f"attention.{layer:02d}") for layer in range(profile.model.depth)]
    ending = ".input_scale"
    paths = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    names = sorted(path.removeprefix("linear.") for path in paths)
    linear = {name: linear_scales(name) for name in names}
    if tensors:
        raise ValueError(f"{len(tensors)} surplus tensors: {', '.join(sorted(tensors)[:8])}")
    return Scales(linear, attention, metadata)


def describe(scales: Scales) -> str:
    """Return one line about the origin of the scales."""
    calibration = json.loads(scales.metadata.get("calibration", "{}"))
    margin, passes = scales.metadata.get("margin", "?"), calibration.get("passes", "?")
    return f"{len(scales.linear)} linear layers, margin {margin}, {passes} passes"
