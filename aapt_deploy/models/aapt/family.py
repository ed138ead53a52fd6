"""Define AAPT as a family: camera rays, recycled latents, its prompts."""

import importlib
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.errors import ProfileError
from aapt_deploy.models.aapt import signature
from aapt_deploy.models.aapt.camera import CRUISE, LIMITS, Pose, Velocity, condition_map
from aapt_deploy.models.aapt.prompts import ATTRIBUTES, Look, parse, token_ids
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.vectors import vectors
from aapt_deploy.profiles import Profile


class CameraFeed:
    """The previous latent, the camera's rays and the block's temporal angles."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.pose = profile, Pose()

    def start(self, latent: np.ndarray) -> None:
        self.previous = latent  # [1, C, h, w]

    def inputs(self, block: int, controls: Velocity) -> dict[str, np.ndarray]:
        before, self.pose = self.pose, self.pose.moved(controls, self.profile.block_seconds)
        return {
            "previous": self.previous,
            "condition": condition_map(self.profile, before, self.pose),
            "rope_time": temporal_rope(self.profile, block)[None],
        }

    def keep(self, latent: np.ndarray) -> None:
        self.previous = latent

    def state(self) -> dict[str, np.ndarray]:
        return {"previous": self.previous, "pose": np.array(astuple(self.pose))}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.previous, self.pose = state["previous"].copy(), Pose(*state["pose"].tolist())


class Aapt:
    """The AAPT family. models/family.py documents the members."""

    stacks = ("text", "visual")
    start_is_block = False
    cruise, limits = CRUISE, LIMITS
    flights = (
        CRUISE,
        Velocity(CRUISE.forward, yaw=LIMITS.yaw / 2),
        Velocity(LIMITS.forward, strafe=LIMITS.strafe, yaw=-LIMITS.yaw),
        Velocity(-CRUISE.forward, strafe=-LIMITS.strafe / 2, pitch=LIMITS.pitch),
        Velocity(yaw=LIMITS.yaw, pitch=-LIMITS.pitch),
    )

    def signatures(self, profile: Profile) -> dict[str, GraphSignature]:
        if (frames := profile.video.block_frames) != 1:
            problem = f"profile {profile.name}: video.block_frames = {frames}"
            raise ProfileError(problem, "AAPT generates one latent frame a block: leave it out")
        if profile.text.attention != "joint" or profile.vae.kind != "aapt":
            keys = f"text.attention = {profile.text.attention!r}, vae.kind = {profile.vae.kind!r}"
            raise ProfileError(f"profile {profile.name}: {keys}", "AAPT has 'joint' and 'aapt'")
        return signature.signatures(profile)

    def generator(self, profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
        return signature.generator(profile, cache_tokens)

    def feed(self, profile: Profile) -> CameraFeed:
        return CameraFeed(profile)

    def times(self, t: float) -> dict[str, np.ndarray]:
        return {"time": np.array([t], np.float32)}

    def temporal_turn(self, profile: Profile, frames: int) -> np.ndarray:
        return temporal_rope(profile, frames)

    def left_and_right(self, block: int) -> Velocity:
        return Velocity(CRUISE.forward, yaw=0.2 * (1 - 2 * (block // 4 % 2)))

    def text_of(self, profile: Profile, prompt: str) -> np.ndarray | None:
        """Return int64 [1, L] ids of words, or float32 [1, L, dim] of the .npy file `prompt`."""
        if not profile.text.tokens:
            return None
        spoken = profile.text.kind == "vocabulary"
        return token_ids(parse(prompt)) if spoken else vectors(profile, prompt)

    def in_common(self, prompt: str, other: str) -> int:
        words = set(vars(parse(prompt)).values()) - {None}
        return len(words & set(vars(parse(other)).values()))

    def random_text(self, profile: Profile, rng: np.random.Generator) -> np.ndarray | None:
        text = profile.text
        if not text.tokens:
            return None
        if text.kind == "vocabulary":
            drawn = {name: str(rng.choice(words)) for name, words in ATTRIBUTES.items()}
            return token_ids(Look(**drawn))
        return rng.standard_normal((1, text.tokens, text.dim), np.float32)

    def networks(self) -> Any:
        return importlib.import_module("aapt_deploy.models.aapt.networks")


FAMILY = Aapt()
