"""Choose a rollout's picture and prompt, from the user or from the bundle's start frames."""

import os
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.models.family import family_of
from aapt_deploy.profiles import Profile


class Start(NamedTuple):
    """A picture and a prompt to start from."""

    image: Any  # uint8 [H, W, 3]; None: start from noise
    prompt: str
    text: np.ndarray | None  # ids or vectors from `text_of`; None if the generator takes no text


def start(bundle: Bundle, image: str | None, prompt: str | None) -> Start:
    """Return the start for a picture file or a start frame's name, and a prompt.

    The default picture is the start frame that fits the prompt best, or none if the family starts
    from noise. Raises UsageError if the name is unknown, or if the prompt or a picture is unusable
    or not taken.
    Raises InputError if the picture is unusable.
    """
    from aapt_deploy.video.pictures import read_image  # av: not on every GPU machine

    video, frames = bundle.profile.video, start_frame_prompts(bundle)
    spoken, family = bundle.profile.text.kind == "vocabulary", family_of(bundle.profile)
    if image is not None and "encoder" not in family.signatures(bundle.profile):
        wrong = f"profile {bundle.profile.name} takes no picture"
        raise UsageError(wrong, "leave --image out: it starts from noise")
    if prompt and not bundle.profile.text.tokens:
        raise UsageError(f"profile {bundle.profile.name} takes no prompt", "leave --prompt out")
    if image is not None and image not in frames:
        if not os.path.exists(image) and frames and "." not in image and "/" not in image:
            names = f"start frames: {', '.join(frames)}; or give a picture file"
            raise UsageError(f"start frame {image!r} does not exist", names)
        return _start(bundle.profile, read_image(image, video.width, video.height), prompt or "")
    if image is None:
        if not frames and family.start_is_block:
            return _start(bundle.profile, None, prompt or "")
        if not frames:
            hint = "give it a picture to start from: --image PICTURE"
            raise UsageError(f"bundle {bundle.path} holds no start frame", hint)
        image, in_common = next(iter(frames)), family.in_common
        if spoken:
            image = max(frames, key=lambda name: in_common(prompt or "", frames[name]))
    own = frames[image] if spoken else ""  # for text encoders it is only a caption, never a path
    file = bundle.checked(f"start/{image}.png")
    return _start(bundle.profile, read_image(file, video.width, video.height), prompt or own)


def all_starts(bundle: Bundle) -> list[Start]:
    """Return every start frame; if there is none, a coarse start, good enough to time steps."""
    frames = start_frame_prompts(bundle)
    return [start(bundle, name, None) for name in frames] or [coarse_start(bundle.profile)]


def coarse_start(profile: Profile) -> Start:
    """Return a random picture in squares of 16 pixels, with an empty prompt.

    A family that may start from noise gets no picture and a random prompt.
    """
    rng = np.random.default_rng(0)
    if family_of(profile).start_is_block:
        return Start(None, "", family_of(profile).random_text(profile, rng))
    return _start(profile, coarse_picture(profile, rng), "")


def coarse_picture(profile: Profile, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture uint8 [H, W, 3] of random colours in squares of 16 pixels."""
    video = profile.video
    size = (-(-video.height // 16), -(-video.width // 16), 3)
    coarse = rng.integers(0, 256, size, np.uint8)
    image = coarse.repeat(16, axis=0).repeat(16, axis=1)[: video.height, : video.width]
    return np.ascontiguousarray(image)


def start_frame_prompts(bundle: Bundle) -> dict[str, str]:
    """Return the prompts of the bundle's start frames by name."""
    frames: dict[str, str] = bundle.manifest.get("start_frames", {})
    return frames


def _start(profile: Profile, image: np.ndarray | None, prompt: str) -> Start:
    return Start(image, prompt, text_of(profile, prompt))


def text_of(profile: Profile, prompt: str) -> np.ndarray | None:
    """Return the prompt graph's input. Raises UsageError if the prompt is unusable."""
    return family_of(profile).text_of(profile, prompt)
