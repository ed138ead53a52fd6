"""Calibrated FP8 scales of one generator: the file that `quantize` writes and everything that computes in FP8 reads. NumPy only.

`scales.safetensors`, all tensors float32. A stored code is e4m3(x / scale), saturating at +-448, and x is about code * scale:

    linear.<path>.input_scale    [1]       static, one for the whole input of the linear layer at `generator.<path>`
    linear.<path>.weight_scale   [out]     one for each output channel, that is each row of `weight` [out, in]
    attention.NN.q_scale         [H]       of layer NN (two digits), after QK-norm and RoPE
    attention.NN.k_scale         [H]       the text's keys included
    attention.NN.k_mean          [H, D]    subtracted from K before it is scaled; zeros: K is not centred
    attention.NN.v_scale         [H, D]    the text's values included

<path> is a path inside `models.generator.Generator`, such as `visual.3.qkv` or `text.3.w1`. A linear layer without scales stays as it is.
Metadata is one JSON object of strings under the key `aapt`, so that the same scales are the same bytes: `format`, `profile` (name),
`checkpoint_sha256`, `margin` (scale = margin * largest magnitude / 448), `keep` (the rules, JSON) and `calibration` (JSON: what was run).

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
    """One calibration: which linear layers run in FP8 and with what scales, and those of every layer's attention and cache."""

    linear: dict[str, LinearScales]  # by path inside the generator
    attention: list[hopper_fp8.Scales]  # by layer, for `onnx_function.lower_for_plugin` and the FP8 cache
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
    with writing(f"scales {path}", "name a file in a folder that exists, with room for it", SafetensorError):
        save_file(contiguous, path, metadata=metadata)


def load(path: Path, profile: Profile) -> Scales:
    """Read a scales file made for `profile`'s shape.

    Raises InputError for a file that is missing, damaged or of another format, and for scales that are misshapen, not positive or not finite.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes long")
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"scales {path} cannot be read: {error}", HINT) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"scales {path} is not of format {FORMAT}", HINT)
    try:
        return _parse(tensors, metadata, profile)
    except ValueError as error:
        raise InputError(f"scales {path} does not fit profile {profile.name}: {error}", HINT) from None


def _parse(tensors: dict[str, Any], metadata: dict[str, str], profile: Profile) -> Scales:
    heads, head_dim = profile.model.heads, profile.head_dim
    shapes = {"q_scale": (heads,), "k_scale": (heads,), "k_mean": (heads, head_dim), "v_scale": (heads, head_dim)}

    def take(name: str, shape: tuple[int, ...] | None) -> Floats:
        value = tensors.pop(name, None)
        if value is None:
            raise ValueError(f"{name} is missing")
        if value.dtype != np.float32 or (value.shape != shape if shape else value.ndim != 1):
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}")
        if not np.isfinite(value).all() or not (name.endswith("k_mean") or (value > 0).all()):
            raise ValueError(f"{name} is not finite and positive")
        return value  # type: ignore[no-any-return]

    attention = [
        hopper_fp8.Scales(**{key: take(f"attention.{layer:02d}.{key}", shape) for key, shape in shapes.items()})
        for layer in range(profile.model.depth)
    ]
    names = sorted(name.removeprefix("linear.").removesuffix(".input_scale") for name in tensors if name.endswith(".input_scale"))
    linear = {name: LinearScales(take(f"linear.{name}.input_scale", (1,)), take(f"linear.{name}.weight_scale", None)) for name in names}
    if tensors:
        raise ValueError(f"{len(tensors)} surplus tensors: {', '.join(sorted(tensors)[:8])}")
    return Scales(linear, attention, metadata)


def describe(scales: Scales) -> str:
    """One line about where the scales come from."""
    calibration = json.loads(scales.metadata.get("calibration", "{}"))
    return f"{len(scales.linear)} linear layers, margin {scales.metadata.get('margin', '?')}, {calibration.get('passes', '?')} passes"
