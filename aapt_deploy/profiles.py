"""A Profile says what we want: the model's shape, the latent's geometry, the window, the sampler, the target.

It is read from a TOML preset (`profiles/`), frozen and validated. Whatever can be computed from it is a property and is never stored, so a
preset cannot contradict itself quietly. Nothing heavy is imported here: `aapt --help` reads this file.
"""

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass
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
    halo: int = (
        0  # latent pixels that a token sees beyond its patch on each side; the paper has none
    )


@dataclass(frozen=True)
class Text:
    """The prompt as the generator sees it."""

    kind: str  # "vocabulary": one id per attribute word; "embedding": vectors of an external text encoder
    tokens: int  # prompt tokens in the cache; 0 for a generator without text
    dim: int  # width of one text token before it enters the generator


@dataclass(frozen=True)
class Video:
    """Pixels and the latent they become (causal VAE, MAGViT-2 style)."""

    width: int  # pixels
    height: int  # pixels
    fps: int  # frames shown per second
    latent_channels: int
    spatial_stride: int = 8  # pixels per latent pixel side
    temporal_stride: int = 4  # frames per latent frame


@dataclass(frozen=True)
class Window:
    """What one block may look back at."""

    frames: int  # past latent frames in the ring (the paper's N)
    sink_frames: int = 1  # first latent frames that are never forgotten


@dataclass(frozen=True)
class Sampler:
    """Generator passes per block, from pure noise down; `[1.0]` is the one-step AAPT generator."""

    timesteps: tuple[float, ...]
    temperature: float = (
        1.0  # deviation of the noise that a block starts from; less is calmer and softer
    )


@dataclass(frozen=True)
class Vae:
    """The causal VAE's convolutions. Empty `encoder_channels` leave its linear patch path alone, which PCA can start."""

    encoder_channels: tuple[int, ...]  # from pixels to latent, one entry per scale
    decoder_channels: tuple[int, ...]  # from latent to pixels, one entry per scale
    blocks: int  # residual blocks per scale
    temporal_kernel: int  # frames seen by a causal convolution
    look_back: str = "first"  # which of the decoder's convolutions see past frames: a residual block's "first", or "all" but the last, as in AAPT's


@dataclass(frozen=True)
class Precision:
    """Number formats of the engine that the target runs."""

    compute: str  # activations outside the quantised products
    weights: str  # weights of linear and convolution layers
    kv_cache: str  # what a cached key or value is stored as


@dataclass(frozen=True)
class Target:
    """The machine this profile is tuned for."""

    device: str  # "cpu" or "cuda"
    name: str  # as people call it: "2 CPU cores", "H100"
    sm: int = 0  # CUDA compute capability x 10; 0 on a CPU
    memory_gb: int = 0  # device memory the plan may use; 0: not checked


@dataclass(frozen=True)
class Quality:
    """What a precision may cost, for `aapt quality`; a preset may leave the section out."""

    latent_error: float = (
        0.10  # largest teacher-forced error of a pass, relative to the latent's own size
    )
    psnr_db: float = 30.0  # least, free-running, over the first second
    ssim: float = 0.90  # least, over the same
    drift_per_s: float = 0.05  # largest slope of the same, per second
    drift: float = 0.15  # largest change of sharpness or brightness against the reference, over the whole rollout, as a share


@dataclass(frozen=True)
class Fp8:
    """Which linear layers of the generator FP8 spares, and how it is calibrated; a preset may leave the section out.

    A rule is a path inside the generator with * for anything; `first` and `last` stand for those blocks: "visual.last.*".
    """

    keep: tuple[str, ...] = (
        "text_in",
        "time_*",
        "*.first.*",
        "*.last.*",
    )  # embeddings, modulation; convolutions, the head's too, always stay
    margin: float = 1.1  # scales reach this much beyond the largest magnitude seen


PRECISIONS = ("fp32", "bf16", "fp8_e4m3", "int8")
LARGEST = {  # of each key, far above what anybody builds: with all of them together, counts of bytes still fit into 64 bits
    "dim": 1 << 16, "depth": 1 << 10, "heads": 1 << 10, "patch": 1 << 6, "mlp_ratio": 1 << 6, "halo": 1 << 6, "tokens": 1 << 16,
    "width": 1 << 14, "height": 1 << 14, "fps": 1000, "latent_channels": 1 << 10, "spatial_stride": 1 << 8, "temporal_stride": 1 << 8,
    "frames": 10_000, "sink_frames": 10_000, "encoder_channels": 1 << 14, "decoder_channels": 1 << 14, "blocks": 1 << 6, "temporal_kernel": 1 << 6,
    "sm": 10_000, "memory_gb": 1 << 20,
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One preset. See the fields' classes; `load` reads and checks it, `dumps` writes it back."""

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

    def __post_init__(self) -> None:
        m, v, w = self.model, self.video, self.window
        self._refuse(self._out_of_range())  # first, because the rest divides by them
        problems = []
        if m.dim % m.heads:
            problems.append(f"model.dim = {m.dim} is not a multiple of model.heads = {m.heads}")
        elif m.dim // m.heads % 8:
            problems.append(
                f"head_dim = model.dim / model.heads = {m.dim // m.heads} is not a multiple of 8, which 3-D RoPE needs"
            )
        unit = v.spatial_stride * m.patch
        if v.width % unit or v.height % unit:
            problems.append(
                f"video {v.width}x{v.height} is not a multiple of spatial_stride x patch = {unit}"
            )
        if w.sink_frames > 1:
            problems.append(
                f"window.sink_frames = {w.sink_frames}: the sink is the first block, so 0 or 1"
            )
        if self.text.kind not in ("vocabulary", "embedding"):
            problems.append(
                f"text.kind = {self.text.kind!r} is neither 'vocabulary' nor 'embedding'"
            )
        steps = self.sampler.timesteps
        if not (
            steps and steps[0] == 1.0 and all(b < a for a, b in pairwise(steps)) and steps[-1] > 0
        ):  # a nan fails too
            problems.append(
                f"sampler.timesteps = {list(steps)} must start at 1.0 and fall, staying above 0"
            )
        if not 0 <= self.sampler.temperature <= 1:  # a nan fails too
            problems.append(
                f"sampler.temperature = {self.sampler.temperature} is not between 0 and 1"
            )
        scales = int(math.log2(v.spatial_stride))
        if not scales or 2**scales != v.spatial_stride or v.temporal_stride != 4:
            problems.append(
                f"video strides {v.spatial_stride} / {v.temporal_stride}: the VAE knows 2, 4, 8, … in space and 4 in time"
            )
        for field, channels in (
            ("encoder_channels", self.vae.encoder_channels),
            ("decoder_channels", self.vae.decoder_channels),
        ):
            fitting = [
                count for count in (scales, scales + 1) if count >= TIME_DOUBLINGS
            ]  # the last scale may change no size
            if (
                fitting
                and len(channels) not in fitting
                and (channels or field == "decoder_channels")
            ):
                problems.append(
                    f"vae.{field} = {list(channels)} has {len(channels)} scales, {' or '.join(map(str, fitting))} fit a stride of {v.spatial_stride}"
                )
        if self.vae.look_back not in ("first", "all"):
            problems.append(f"vae.look_back = {self.vae.look_back!r} is neither 'first' nor 'all'")
        for field, value in dataclasses.asdict(self.precision).items():
            if value not in PRECISIONS:
                problems.append(
                    f"precision.{field} = {value!r} is not one of {', '.join(PRECISIONS)}"
                )
        for field, value in dataclasses.asdict(self.quality).items():
            if not 0 < value < math.inf:  # a nan fails too
                problems.append(f"quality.{field} = {value} is not a positive number")
        if not 1 <= self.fp8.margin < math.inf:  # a nan fails too
            problems.append(
                f"fp8.margin = {self.fp8.margin} is below 1: values that were seen would saturate"
            )
        if self.target.device not in ("cpu", "cuda"):
            problems.append(f"target.device = {self.target.device!r} is neither 'cpu' nor 'cuda'")
        self._refuse(problems)

    def _out_of_range(self) -> list[str]:
        """Sizes and channel counts that are not positive, or so large that nothing can be computed of them."""
        problems = []
        for name in ("model", "text", "video", "window", "vae", "target"):
            for field, value in dataclasses.asdict(getattr(self, name)).items():
                smallest = 0 if field in ("halo", "tokens", "sink_frames", "sm", "memory_gb") else 1
                values = value if isinstance(value, tuple) else (value,)
                problems += [
                    f"{name}.{field} = {v} is below {smallest}"
                    for v in values
                    if isinstance(v, int) and v < smallest
                ]
                problems += [
                    f"{name}.{field} = {v} is above {LARGEST[field]}"
                    for v in values
                    if isinstance(v, int) and v > LARGEST[field]
                ]
        return problems

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ProfileError(
                f"profile {self.name}: {'; '.join(problems)}",
                "correct the values in the profile's TOML file",
            )

    # Derived figures: computed here, stored nowhere.

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
        """Tokens of one latent frame."""
        return self.latent_height * self.latent_width // self.model.patch**2

    @property
    def step_budget_ms(self) -> float:
        """Time in which one block of frames is shown: 4 / 24 s = 166.7 ms."""
        return 1000 * self.video.temporal_stride / self.video.fps

    @property
    def cache_tokens(self) -> int:
        """Tokens of one layer's cache: text, sink, ring."""
        return self.text.tokens + (self.window.sink_frames + self.window.frames) * self.frame_tokens

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of all layers' K and V caches together."""
        item = {"fp32": 4, "bf16": 2, "fp8_e4m3": 1, "int8": 1}[self.precision.kv_cache]
        return 2 * self.model.depth * self.cache_tokens * self.model.dim * item

    @property
    def family(self) -> str:
        """The kind of checkpoint, a row of models/family.py."""
        return "aapt"

    def replace(self, **sections: Any) -> "Profile":
        """A copy with whole sections replaced; checked again."""
        return dataclasses.replace(self, **sections)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dumps(self) -> str:
        """The preset as TOML; `loads(p.dumps()) == p`."""
        lines = [f"name = {_toml(self.name)}"]
        for section, fields in self.to_dict().items():
            if isinstance(fields, dict):
                lines += ["", f"[{section}]"]
                lines += [f"{key} = {_toml(value)}" for key, value in fields.items()]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return (
        json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        if isinstance(value, str)
        else repr(value)
    )


def loads(text: str, source: str) -> Profile:
    """Parse a preset. `source` names it in errors.

    Raises ProfileError for TOML that does not parse, for unknown, missing or mistyped keys (all listed at once), and for contradictions.
    """
    try:
        raw = tomllib.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # not only TOMLDecodeError: an integer of 5000 digits is a bare ValueError
        raise ProfileError(
            f"profile {source}: not valid TOML: {error}",
            "see profiles/demo-cpu.toml for a complete example",
        ) from None
    problems: list[str] = []
    sections: dict[str, Any] = {}
    hints = get_type_hints(Profile)
    problems += [f"unknown key {key!r}" for key in raw if key not in hints]
    for name, kind in hints.items():
        if name not in raw:
            if kind in (Quality, Fp8):  # the sections that have a default for everything
                continue
            problems.append(f"missing {'key' if kind is str else 'section'} {name!r}")
        elif kind is str:
            sections[name] = raw[name]
            if not isinstance(raw[name], str):
                problems.append(f"{name!r} = {raw[name]!r} must be str")
        elif not isinstance(raw[name], dict):
            problems.append(f"{name!r} must be a section [{name}]")
        else:
            sections[name] = _section(name, kind, raw[name], problems)
    if problems:
        known = ", ".join(hints)
        raise ProfileError(
            f"profile {source}: {'; '.join(problems)}",
            f"sections are {known}; each field is described in aapt_deploy/profiles.py",
        )
    return Profile(**sections)


def _section(name: str, kind: type, raw: dict[str, Any], problems: list[str]) -> Any:
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    before = len(problems)
    problems += [
        f"unknown key '{name}.{key}' (known: {', '.join(hints)})" for key in raw if key not in hints
    ]
    problems += [f"missing key '{name}.{key}'" for key in sorted(required - raw.keys())]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            continue
        wanted = hints[key]
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
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)


def preset_folder() -> Path:
    """Where the shipped presets are: inside an installed package, else at the top of a checkout."""
    packaged = Path(__file__).parent / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "profiles"


def load(name: str) -> Profile:
    """The profile in file `name`, or the shipped preset of that name. Raises ProfileError."""
    path = Path(name)
    if not path.is_file():
        path = preset_folder() / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in preset_folder().glob("*.toml")))
        raise ProfileError(
            f"profile {name!r} is neither a file nor a shipped preset",
            f"shipped presets: {shipped}",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"profile {path}: cannot be read: {error}", "give a UTF-8 TOML file"
        ) from None
    return loads(text, str(path))
