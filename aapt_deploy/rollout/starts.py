"""Where a rollout starts: a picture and a prompt, from the user or from the start frames that a bundle brings."""

import os
from typing import NamedTuple

import numpy as np

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile
from aapt_deploy.video.pictures import read_image


class Start(NamedTuple):
    """A start of a rollout."""

    image: np.ndarray  # uint8 [H, W, 3]
    prompt: str
    text: np.ndarray | None  # prompt ids or vectors, as `text_of` makes them; None where the generator takes no text


def start(bundle: Bundle, image: str | None, prompt: str | None) -> Start:
    """What the user asked for: a picture file or the name of a start frame, and a prompt; by default the start frame that fits the prompt.

    Raises UsageError for an unknown name, a prompt that cannot be used, and one where none is taken; InputError for a picture that cannot be used.
    """
    video, frames = bundle.profile.video, start_frame_prompts(bundle)
    spoken = bundle.profile.text.kind == "vocabulary"
    if prompt and not bundle.profile.text.tokens:
        raise UsageError(f"profile {bundle.profile.name} takes no prompt", "leave --prompt out")
    if image is not None and image not in frames:
        if not os.path.exists(image) and frames and "." not in image and "/" not in image:
            raise UsageError(f"start frame {image!r} does not exist", f"start frames: {', '.join(frames)}; or give a picture file")
        return _start(bundle.profile, read_image(image, video.width, video.height), prompt or "")
    if image is None:
        if not frames:
            raise UsageError(f"bundle {bundle.path} holds no start frame", "give it a picture to start from: --image PICTURE")
        family, asked = family_of(bundle.profile), prompt or ""
        image = max(frames, key=lambda name: family.in_common(asked, frames[name])) if spoken else next(iter(frames))
    own = frames[image] if spoken else ""  # elsewhere it is a description for people, and must not be taken for a file's name
    return _start(bundle.profile, read_image(bundle.checked(f"start/{image}.png"), video.width, video.height), prompt or own)


def all_starts(bundle: Bundle) -> list[Start]:
    """Every start frame of the bundle. A bundle without any gets a coarse random picture, which is enough to measure time."""
    frames = start_frame_prompts(bundle)
    return [start(bundle, name, None) for name in frames] if frames else [coarse_start(bundle.profile)]


def coarse_start(profile: Profile) -> Start:
    """A coarse random picture and no prompt."""
    return _start(profile, coarse_picture(profile, np.random.default_rng(0)), "")


def coarse_picture(profile: Profile, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture uint8 [H, W, 3] of random colours in squares of 16 pixels."""
    video = profile.video
    coarse = rng.integers(0, 256, (-(-video.height // 16), -(-video.width // 16), 3), np.uint8)
    image = coarse.repeat(16, axis=0).repeat(16, axis=1)[: video.height, : video.width]
    return np.ascontiguousarray(image)


def start_frame_prompts(bundle: Bundle) -> dict[str, str]:
    """Names of the bundle's start frames and what they show."""
    frames: dict[str, str] = bundle.manifest.get("start_frames", {})
    return frames


def _start(profile: Profile, image: np.ndarray, prompt: str) -> Start:
    return Start(image, prompt, family_of(profile).text_of(profile, prompt))


def text_of(profile: Profile, prompt: str) -> np.ndarray | None:
    """What the prompt graph reads. Raises UsageError for a prompt that cannot be used."""
    return family_of(profile).text_of(profile, prompt)
