"""Profiles: shape of the networks, geometry of the latent, window, sampler, target.

A profile is read from a TOML preset (`profiles/`), frozen and validated. What can be computed from
it is a property, never stored. Nothing heavy is imported: `aapt --help` imports this file.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from aapt_deploy.errors import ProfileError

CONDITION_CHANNELS = 6  # camera ray origin (3) and direction (3), AAPT App. G
PIXEL_CHANNELS = 3
TIME_DOUBLINGS = 2  # of the VAE's scales next to the latent: 4 frames per latent frame


@dataclass(frozen=True)
class Model:
    """The generator: a text + visual MMDiT (AAPT App. A)."""

    dim: int  # width of both streams
    depth: int  # transformer blocks
    heads: int  # attention heads; head_dim = dim / heads
    patch: int  # latent pixels per token side
    mlp_ratio: int = 4  # hidden width of the MLP / dim
    halo: int = 0  # latent pixels that a token sees around its patch; the paper has none


@dataclass(frozen=True)
class Text:
    """The prompt as the generator reads it."""

    kind: str  # "vocabulary": an id per attribute word; "embedding": an external encoder's vectors
    tokens: int  # prompt tokens in the cache; 0 for a generator without text
    dim: int  # width of one text token before it enters the generator


@dataclass(frozen=True)
class Video:
    """Pixels, and the latent that they are encoded to (causal VAE, MAGViT-2 style)."""

    width: int  # pixels
    height: int  # pixels
    fps: int  # frames shown per second
    latent_channels: int
    spatial_stride: int = 8  # pixels per latent pixel side
    temporal_stride: int = 4  # frames per latent frame
    block_frames: int = 1  # latent frames that are generated together


@dataclass(frozen=True)
class Window:
    """The latent frames that a block attends to."""

    frames: int  # past latent frames in the ring (the paper's N), whole blocks of them
    sink_frames: int = 1  # first latent frames that are never overwritten: one block or none


@dataclass(frozen=True)
class Sampler:
    """Generator passes per block, from noise down; `[1.0]` is AAPT's one-step generator."""

    timesteps: tuple[float, ...]
    temperature: float = 1.0  # deviation of a block's first noise; less is calmer and softer


@dataclass(frozen=True)
class Vae:
    """The causal VAE's convolutions; channels have one entry per scale."""

    encoder_channels: tuple[int, ...]  # to the latent; empty: a linear patch path, for PCA to start
    decoder_channels: tuple[int, ...]  # from the latent to pixels
    blocks: int  # residual blocks per scale
    temporal_kernel: int  # frames seen by a causal convolution
    look_back: str = "first"  # decoder convolutions with a past: a block's "first", or "all"


@dataclass(frozen=True)
class Precision:
    """Number formats of the engine that the target runs."""

    compute: str  # activations outside the quantised products
    weights: str  # weights of linear and convolution layers
    kv_cache: str  # keys and values in the caches


@dataclass(frozen=True)
class Target:
    """The machine this profile is tuned for."""

    device: str  # "cpu" or "cuda"
    name: str  # "2 CPU cores", "H100"
    sm: int = 0  # CUDA compute capability x 10; 0 on a CPU
    memory_gb: int = 0  # device memory the plan may use; 0: not checked


@dataclass(frozen=True)
class Quality:
    """The most that a precision may cost, for `aapt quality`; the section is optional."""

    latent_error: float = 0.10  # most, of a teacher-forced pass, relative to the latent's size
    psnr_db: float = 30.0  # least, free-running, over the first second
    ssim: float = 0.90  # least, over the same
    drift_per_s: float = 0.05  # largest slope of the drift, per second
    drift: float = 0.15  # most, of sharpness or brightness over the rollout, as a share


@dataclass(frozen=True)
class Fp8:
    """Linear layers that stay out of FP8, and its calibration; the section is optional."""

    # Paths in the generator: * for anything, `first` and `last` for those blocks. By default
    # embeddings and modulation. Convolutions, the head's too, always stay.
    keep: tuple[str, ...] = ("text_in", "time_*", "*.first.*", "*.last.*")
    margin: float = 1.1  # largest magnitude of a scale, relative to the largest one seen


PRECISIONS = ("fp32", "bf16", "fp8_e4m3", "int8")
LARGEST = {  # far above any real profile; with all of them, counts of bytes still fit 64 bits
    "dim": 1 << 16, "depth": 1 << 10, "heads": 1 << 10, "patch": 1 << 6, "mlp_ratio": 1 << 6,
    "halo": 1 << 6, "tokens": 1 << 16, "width": 1 << 14, "height": 1 << 14, "fps": 1000,
    "latent_channels": 1 << 10, "spatial_stride": 1 << 8, "temporal_stride": 1 << 8,
    "frames": 10_000, "sink_frames": 10_000, "block_frames": 100, "encoder_channels": 1 << 14,
    "decoder_channels": 1 << 14, "blocks": 1 << 6, "temporal_kernel": 1 << 6,
    "sm": 10_000, "memory_gb": 1 << 20,
}  # fmt: skip
LATER = {"family": "aapt", "video.block_frames": 1}  # files without them are older than these keys
MAY_BE_ZERO = ("halo", "tokens", "sink_frames", "sm", "memory_gb")


@dataclass(frozen=True)
class Profile:
    """One preset, validated. `load` reads it, `dumps` writes it."""

    name: str
    model: Model
    text: Text
    video: Video
    window: Window
    sampler: Sampler
    vae: Vae
    precision: Precision
    target: Target
    quality: Quality = Quality()
    fp8: Fp8 = Fp8()
    family: str = "aapt"  # the kind of checkpoint: a row of models/family.py

    def __post_init__(self) -> None:
        self._refuse(self._out_of_range())  # first, because the rest divides by them
        self._refuse([*self._contradictions(), *self._bad_values()])

    def _out_of_range(self) -> list[str]:
        """List sizes and channel counts below 1, or so large that counts would overflow."""
        problems = []
        for name in ("model", "text", "video", "window", "vae", "target"):
            for field, value in dataclasses.asdict(getattr(self, name)).items():
                least = 0 if field in MAY_BE_ZERO else 1
                values = value if isinstance(value, tuple) else (value,)
                counts = [v for v in values if isinstance(v, int)]
                key, most = f"{name}.{field}", LARGEST[field] if counts else 0
                problems += [f"{key} = {v} is below {least}" for v in counts if v < least]
                problems += [f"{key} = {v} is above {most}" for v in counts if v > most]
        return problems

    def _contradictions(self) -> Iterator[str]:
        """Yield every contradiction between sizes."""
        m, v, w, vae = self.model, self.video, self.window, self.vae
        head_dim, rest = divmod(m.dim, m.heads)
        if rest:
            yield f"model.dim = {m.dim} is not a multiple of model.heads = {m.heads}"
        elif head_dim % 8:
            why = "is not a multiple of 8, which 3-D RoPE needs"
            yield f"head_dim = model.dim / model.heads = {head_dim} {why}"
        if v.width % (unit := v.spatial_stride * m.patch) or v.height % unit:
            yield f"video {v.width}x{v.height} is not a multiple of spatial_stride x patch = {unit}"
        if w.frames % (block := v.block_frames):
            yield f"window.frames = {w.frames} is not a multiple of video.block_frames = {block}"
        if (sink := w.sink_frames) not in (0, block):
            yield f"window.sink_frames = {sink}: the sink is the first block, so 0 or {block}"
        if self.text.kind not in ("vocabulary", "embedding"):
            yield f"text.kind = {self.text.kind!r} is neither 'vocabulary' nor 'embedding'"
        steps = list(self.sampler.timesteps)
        falling = all(b < a for a, b in pairwise(steps))  # a nan fails, here and below
        if not (steps and steps[0] == 1.0 and falling and steps[-1] > 0):
            yield f"sampler.timesteps = {steps} must start at 1.0 and fall, staying above 0"
        if not 0 <= self.sampler.temperature <= 1:
            yield f"sampler.temperature = {self.sampler.temperature} is not between 0 and 1"
        scales = int(math.log2(v.spatial_stride))
        if not scales or 2**scales != v.spatial_stride or v.temporal_stride != 4:
            strides = f"video strides {v.spatial_stride} / {v.temporal_stride}"
            yield f"{strides}: the VAE knows 2, 4, 8, … in space and 4 in time"
        fitting = [count for count in (scales, scales + 1) if count >= TIME_DOUBLINGS]
        for field in ("encoder_channels", "decoder_channels"):
            channels = getattr(vae, field)
            absent = field == "encoder_channels" and not channels
            if fitting and not absent and len(channels) not in fitting:
                count = f"vae.{field} = {list(channels)} has {len(channels)} scales"
                fit = " or ".join(map(str, fitting))
                yield f"{count}, {fit} fit a stride of {v.spatial_stride}"

    def _bad_values(self) -> Iterator[str]:
        """Yield every value that is not one of a list, or not in the range of its key."""
        if self.vae.look_back not in ("first", "all"):
            yield f"vae.look_back = {self.vae.look_back!r} is neither 'first' nor 'all'"
        for field, value in dataclasses.asdict(self.precision).items():
            if value not in PRECISIONS:
                yield f"precision.{field} = {value!r} is not one of {', '.join(PRECISIONS)}"
        for field, value in dataclasses.asdict(self.quality).items():
            if not 0 < value < math.inf:  # a nan fails, here and below
                yield f"quality.{field} = {value} is not a positive number"
        if not 1 <= (margin := self.fp8.margin) < math.inf:
            yield f"fp8.margin = {margin} is below 1: values that were seen would saturate"
        if (device := self.target.device) not in ("cpu", "cuda"):
            yield f"target.device = {device!r} is neither 'cpu' nor 'cuda'"

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            problem = f"profile {self.name}: {'; '.join(problems)}"
            raise ProfileError(problem, "correct the values in the profile's TOML file")

    @property
    def head_dim(self) -> int:
        return self.model.dim // self.model.heads

    @property
    def latent_height(self) -> int:
        return self.video.height // self.video.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.video.width // self.video.spatial_stride

    @property
    def frame_tokens(self) -> int:
        """Count the tokens of one latent frame."""
        return self.latent_height * self.latent_width // self.model.patch**2

    @property
    def block_tokens(self) -> int:
        return self.frame_tokens * self.video.block_frames

    @property
    def frames_per_block(self) -> int:
        """Count the pixel frames that one block decodes to."""
        return self.video.block_frames * self.video.temporal_stride

    @property
    def block_seconds(self) -> float:
        return self.frames_per_block / self.video.fps

    @property
    def step_budget_ms(self) -> float:
        """Return the time for which one block of frames is shown: 4 / 24 s = 166.7 ms."""
        return 1000 * self.block_seconds

    @property
    def cache_tokens(self) -> int:
        """Count the tokens of one layer's cache: text, sink, ring."""
        return self.text.tokens + (self.window.sink_frames + self.window.frames) * self.frame_tokens

    @property
    def kv_cache_bytes(self) -> int:
        """Count the bytes of all layers' K and V caches together."""
        item = {"fp32": 4, "bf16": 2, "fp8_e4m3": 1, "int8": 1}[self.precision.kv_cache]
        return 2 * self.model.depth * self.cache_tokens * self.model.dim * item

    def replace(self, **sections: Any) -> "Profile":
        """Return a copy with whole sections replaced; validated again."""
        return dataclasses.replace(self, **sections)

    def dumps(self) -> str:
        """Return the preset as TOML; `loads(p.dumps(), source) == p`."""
        lines = [f"name = {_toml(self.name)}"]
        if LATER["family"] != self.family:
            lines.append(f"family = {_toml(self.family)}")
        for section, fields in dataclasses.asdict(self).items():
            if isinstance(fields, dict):
                lines += ["", f"[{section}]"]
                written = {k: v for k, v in fields.items() if LATER.get(f"{section}.{k}") != v}
                lines += [f"{key} = {_toml(value)}" for key, value in written.items()]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def loads(text: str, source: str) -> Profile:
    """Parse a preset. `source` names it in errors.

    Raises ProfileError if the TOML does not parse, if keys are unknown, missing or mistyped, or if
    values contradict each other. It lists all of them.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits is a ValueError
        problem = f"profile {source}: not valid TOML: {error}"
        raise ProfileError(problem, "see profiles/demo-cpu.toml for a complete example") from None
    sections, hints = dict[str, Any](), get_type_hints(Profile)
    optional = {f.name for f in dataclasses.fields(Profile) if f.default is not MISSING}
    problems = [f"unknown key {key!r}" for key in raw if key not in hints]
    for name, kind in hints.items():
        if name not in raw:
            missing = f"missing {'key' if kind is str else 'section'} {name!r}"
            problems += [missing] * (name not in optional)
        elif kind is str:
            sections[name] = raw[name]
            if not isinstance(raw[name], str):
                problems.append(f"{name!r} = {raw[name]!r} must be str")
        elif not isinstance(raw[name], dict):
            problems.append(f"{name!r} must be a section [{name}]")
        else:
            sections[name] = _section(name, kind, raw[name], problems)
    if problems:
        hint = f"sections are {', '.join(hints)}; aapt_deploy/profiles.py describes each field"
        raise ProfileError(f"profile {source}: {'; '.join(problems)}", hint)
    return Profile(**sections)


def _section(name: str, kind: type, raw: dict[str, Any], problems: list[str]) -> Any:
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is MISSING}
    before = len(problems)
    known = f"(known: {', '.join(hints)})"
    problems += [f"unknown key '{name}.{key}' {known}" for key in raw if key not in hints]
    problems += [f"missing key '{name}.{key}'" for key in sorted(required - raw.keys())]
    values: dict[str, Any] = {}
    for key in (key for key in raw if key in hints):
        value, wanted = raw[key], hints[key]
        if get_args(wanted):  # tuple[int, ...] or tuple[float, ...]
            item = get_args(wanted)[0]
            if not isinstance(value, list) or not all(_is(v, item) for v in value):
                problems.append(f"'{name}.{key}' = {value!r} must be a list of {item.__name__}")
            else:
                values[key] = tuple(item(v) for v in value)
        elif not _is(value, wanted):
            problems.append(f"'{name}.{key}' = {value!r} must be {wanted.__name__}")
        else:
            values[key] = value
    return kind(**values) if len(problems) == before else None


def _is(value: Any, wanted: type) -> bool:
    kinds = (int, float) if wanted is float else wanted
    return isinstance(value, kinds) and not isinstance(value, bool)


def preset_folder() -> Path:
    """Return the folder of the shipped presets: in an installed package, else in a checkout."""
    packaged = Path(__file__).parent / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "profiles"


def load(name: str) -> Profile:
    """Load a profile from the file `name`, or the shipped preset of that name.

    Raises ProfileError if there is neither, or if it cannot be read or is invalid.
    """
    path = Path(name) if Path(name).is_file() else preset_folder() / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in preset_folder().glob("*.toml")))
        problem = f"profile {name!r} is neither a file nor a shipped preset"
        raise ProfileError(problem, f"shipped presets: {shipped}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"profile {path}: cannot be read: {error}"
        raise ProfileError(problem, "give a UTF-8 TOML file") from None
    return loads(text, str(path))
