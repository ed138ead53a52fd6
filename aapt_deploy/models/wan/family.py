"""Define the causal family of Wan2.1: text in cross-attention, no camera, start image optional."""

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.errors import ProfileError
from aapt_deploy.models.vectors import vectors
from aapt_deploy.models.wan import signature
from aapt_deploy.models.wan.rope import temporal_rope, time_features
from aapt_deploy.profiles import Profile


@dataclass(frozen=True)
class Nothing:
    """No controls but the prompt."""


class FrameFeed:
    """The temporal angles of a block's latent frames. Nothing passes from block to block."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def start(self, latent: np.ndarray) -> None:
        """Do nothing: the start latent is block 0."""

    def inputs(self, block: int, controls: Nothing) -> dict[str, np.ndarray]:
        n = self.profile.video.block_frames
        return {"rope_time": temporal_rope(self.profile, np.arange(block * n, (block + 1) * n))}

    def keep(self, latent: np.ndarray) -> None:
        """Do nothing."""

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Do nothing."""


class Wan:
    """The Wan family. models/family.py documents the members."""

    stacks = ("blocks",)
    start_is_block = True
    cruise = limits = Nothing()
    flights = (Nothing(),)

    def signatures(self, profile: Profile) -> dict[str, GraphSignature]:
        if problems := list(_contradictions(profile)):
            problem = f"profile {profile.name}: {'; '.join(problems)}"
            raise ProfileError(problem, "see profiles/wan-tiny-cpu.toml for a complete example")
        return signature.signatures(profile)

    def generator(self, profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
        return signature.generator(profile, cache_tokens)

    def feed(self, profile: Profile) -> FrameFeed:
        return FrameFeed(profile)

    def times(self, t: float) -> dict[str, np.ndarray]:
        return {"time": np.array([t], np.float32), "time_features": time_features(t)}

    def temporal_turn(self, profile: Profile, frames: int) -> np.ndarray:
        turn: np.ndarray = temporal_rope(profile, np.array([frames]))[0, :, 0]
        return turn

    def left_and_right(self, block: int) -> Nothing:
        return Nothing()

    def text_of(self, profile: Profile, prompt: str) -> np.ndarray:
        """Return float32 [1, L, dim] of the .npy file `prompt`; zeros for ""."""
        return vectors(profile, prompt)

    def in_common(self, prompt: str, other: str) -> int:
        """Return 0: prompts are vectors, which start frames have not."""
        return 0

    def random_text(self, profile: Profile, rng: np.random.Generator) -> np.ndarray:
        """Draw vectors for half of the tokens; as of an encoder, the rest is zero."""
        text = profile.text
        drawn = np.zeros((1, text.tokens, text.dim), np.float32)
        words = text.tokens // 2
        drawn[:, :words] = rng.standard_normal((1, words, text.dim), np.float32)
        return drawn

    def networks(self) -> object:
        return importlib.import_module("aapt_deploy.models.wan.networks")


def _contradictions(profile: Profile) -> Iterator[str]:
    """Yield what the family's networks cannot be built from."""
    p, v, vae = profile, profile.video, profile.vae
    wanted = [
        ("text.attention", p.text.attention, ("cross",)),
        ("text.kind", p.text.kind, ("embedding",)),
        ("vae.kind", vae.kind, ("wan", "taehv")),
        ("model.halo", p.model.halo, (0,)),
        ("video.latent_channels", v.latent_channels, (16,)),
    ]
    for key, value, fit in wanted:
        if value not in fit:
            yield f"{key} = {value!r} is not {' or '.join(map(repr, fit))}"
    if not p.text.tokens:
        yield "text.tokens = 0: the family takes a prompt"
    kernel = {"wan": 3, "taehv": 2}.get(vae.kind, vae.temporal_kernel)
    if vae.temporal_kernel != kernel:
        yield f"vae.temporal_kernel = {vae.temporal_kernel} is not {kernel}, as {vae.kind} has"
    scales = int(math.log2(v.spatial_stride)) + 1
    for field in ("encoder_channels", "decoder_channels"):
        channels = getattr(vae, field)
        if channels and len(channels) != scales:
            yield f"vae.{field} = {list(channels)} has {len(channels)} scales, not {scales}"
    if vae.encoder_channels and v.block_frames > 1:
        why = "a start image is one latent frame, and must fill block 0"
        yield f"vae.encoder_channels is set with video.block_frames = {v.block_frames}: {why}"


FAMILY = Wan()
