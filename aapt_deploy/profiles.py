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
from aapt_deploy.sections import CONDITION_CHANNELS as CONDITION_CHANNELS
from aapt_deploy.sections import LARGEST as LARGEST
from aapt_deploy.sections import MAY_BE_ZERO, PRECISIONS, TIME_DOUBLINGS, Fp8, Quality
from aapt_deploy.sections import PIXEL_CHANNELS as PIXEL_CHANNELS
from aapt_deploy.sections import Model as Model
from aapt_deploy.sections import Precision as Precision
from aapt_deploy.sections import Sampler as Sampler
from aapt_deploy.sections import Target as Target
from aapt_deploy.sections import Text as Text
from aapt_deploy.sections import Vae as Vae
from aapt_deploy.sections import Video as Video
from aapt_deploy.sections import Window as Window

# Keys whose default is not written: files without them are older.
LATER = {
    "family": "aapt", "model.ffn": 0, "text.attention": "joint", "text.replay": False,
    "video.block_frames": 1, "window.sink_follows": False, "window.trained_frames": 0,
    "sampler.kind": "bent", "sampler.first_block": (),
    "sampler.write": False, "vae.kind": "aapt",
}  # fmt: skip
CHOICES = {
    "text.kind": ("vocabulary", "embedding"), "text.attention": ("joint", "cross"),
    "sampler.kind": ("bent", "renoise"), "vae.kind": ("aapt", "wan", "taehv"),
    "vae.look_back": ("first", "all"), "target.device": ("cpu", "cuda"),
    "precision.compute": PRECISIONS, "precision.weights": PRECISIONS,
    "precision.kv_cache": PRECISIONS,
}  # fmt: skip


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
    quality: Quality = dataclasses.field(default_factory=Quality)
    fp8: Fp8 = dataclasses.field(default_factory=Fp8)
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
                counts = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
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
        elif head_dim % 4 or head_dim < 8:
            why = "is not 8 or a larger multiple of 4, which 3-D RoPE needs"
            yield f"head_dim = model.dim / model.heads = {head_dim} {why}"
        if v.width % (unit := v.spatial_stride * m.patch) or v.height % unit:
            yield f"video {v.width}x{v.height} is not a multiple of spatial_stride x patch = {unit}"
        if w.frames % (block := v.block_frames):
            yield f"window.frames = {w.frames} is not a multiple of video.block_frames = {block}"
        if w.sink_frames % block:
            sink = f"window.sink_frames = {w.sink_frames}"
            yield f"{sink} is not a multiple of video.block_frames = {block}"
        if w.sink_follows and not w.sink_frames:
            yield "window.sink_follows is set, and window.sink_frames = 0"
        for key in ("timesteps", "first_block"):
            steps = list(getattr(self.sampler, key))
            falling = all(b < a for a, b in pairwise(steps))  # a nan fails, here and below
            sound = steps and steps[0] == 1.0 and falling and steps[-1] > 0
            if not sound and (steps or key == "timesteps"):
                yield f"sampler.{key} = {steps} must start at 1.0 and fall, staying above 0"
        if not 0 <= self.sampler.temperature <= 1:
            yield f"sampler.temperature = {self.sampler.temperature} is not between 0 and 1"
        if self.text.replay and not self.sampler.write:
            yield "text.replay is set, and sampler.write is not: it repeats that pass"
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
        for key, choices in CHOICES.items():
            section, _, field = key.partition(".")
            if (value := getattr(getattr(self, section), field)) not in choices:
                yield f"{key} = {value!r} is not one of {', '.join(choices)}"
        for field, value in dataclasses.asdict(self.quality).items():
            if not 0 < value < math.inf:  # a nan fails, here and below
                yield f"quality.{field} = {value} is not a positive number"
        if not 1 <= (margin := self.fp8.margin) < math.inf:
            yield f"fp8.margin = {margin} is below 1: values that were seen would saturate"

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            problem = f"profile {self.name}: {'; '.join(problems)}"
            raise ProfileError(problem, "correct the values in the profile's TOML file")

    @property
    def head_dim(self) -> int:
        return self.model.dim // self.model.heads

    @property
    def ffn_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return self.model.ffn or self.model.mlp_ratio * self.model.dim

    @property
    def passes(self) -> int:
        """Count the generator's passes of a block, the cache-write pass included."""
        return len(self.sampler.timesteps) + self.sampler.write

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
    def trained_seconds(self) -> float:
        """Return the length of a training video; infinity if streams may be endless."""
        latents, video = self.window.trained_frames, self.video
        return (1 + (latents - 1) * video.temporal_stride) / video.fps if latents else math.inf

    @property
    def cached_text_tokens(self) -> int:
        """Count the text tokens at the front of a cache; 0 with cross-attention."""
        return self.text.tokens if self.text.attention == "joint" else 0

    @property
    def cache_tokens(self) -> int:
        """Count the tokens of one layer's cache: text, sink, ring."""
        seen = self.window.sink_frames + self.window.frames
        return self.cached_text_tokens + seen * self.frame_tokens

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
    if isinstance(value, bool):
        return str(value).lower()
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
    fields = dataclasses.fields(Profile)
    optional = {f.name for f in fields if (f.default, f.default_factory) != (MISSING, MISSING)}
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
        hint = f"sections are {', '.join(hints)}; aapt_deploy/sections.py describes each field"
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
    return isinstance(value, kinds) and (wanted is bool) == isinstance(value, bool)


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
