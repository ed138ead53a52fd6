"""Where a rollout starts: a picture and a prompt, from the user or from the start frames that a bundle brings."""

import os
from typing import NamedTuple

import numpy as np

from aapt_deploy.bundle import Bundle
from aapt_deploy.errors import UsageError
from aapt_deploy.prompts import parse, token_ids
from aapt_deploy.video import read_image


class Start(NamedTuple):
    """A start of a rollout."""

    image: np.ndarray  # uint8 [H, W, 3]
    prompt: str
    text: np.ndarray | None  # prompt ids; None where the generator takes no text


def start(bundle: Bundle, image: str | None, prompt: str | None) -> Start:
    """What the user asked for: a picture file or the name of a start frame, and a prompt; by default the start frame that fits the prompt.

    Raises UsageError for an unknown name, an unknown word, and a prompt where none is taken; InputError for a picture that cannot be used.
    """
    video, frames = bundle.profile.video, start_frame_prompts(bundle)
    if prompt and not bundle.profile.text.tokens:
        raise UsageError(f"profile {bundle.profile.name} takes no prompt", "leave --prompt out")
    if image is not None and image not in frames:
        if not os.path.exists(image) and frames and "." not in image and "/" not in image:
            raise UsageError(f"start frame {image!r} does not exist", f"start frames: {', '.join(frames)}; or give a picture file")
        return _start(bundle, read_image(image, video.width, video.height), prompt or "")
    if image is None:
        if not frames:
            raise UsageError(f"bundle {bundle.path} holds no start frame", "give a picture with --image FILE")
        words = set(vars(parse(prompt or "")).values()) - {None}
        image = max(frames, key=lambda name: len(words & set(vars(parse(frames[name])).values())))
    return _start(bundle, read_image(bundle.checked(f"start/{image}.png"), video.width, video.height), prompt or frames[image])


def all_starts(bundle: Bundle) -> list[Start]:
    """Every start frame of the bundle. A bundle without any gets a coarse random picture, which is enough to measure time."""
    frames = start_frame_prompts(bundle)
    if frames:
        return [start(bundle, name, None) for name in frames]
    video = bundle.profile.video
    coarse = np.random.default_rng(0).integers(0, 256, (-(-video.height // 16), -(-video.width // 16), 3), np.uint8)
    image = coarse.repeat(16, axis=0).repeat(16, axis=1)[: video.height, : video.width]
    return [_start(bundle, np.ascontiguousarray(image), "")]


def start_frame_prompts(bundle: Bundle) -> dict[str, str]:
    """Names of the bundle's start frames and what they show."""
    frames: dict[str, str] = bundle.manifest.get("start_frames", {})
    return frames


def _start(bundle: Bundle, image: np.ndarray, prompt: str) -> Start:
    return Start(image, prompt, token_ids(parse(prompt)) if bundle.profile.text.tokens else None)
