"""All clips as latents, encoded once and cached in the folder of the run."""

import contextlib
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.files import whole
from aapt_deploy.errors import InputError
from aapt_deploy.models.aapt.vae import Vae, from_pixels
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile
from aapt_deploy.train.losses.flow import Latents
from aapt_deploy.train.world.data import ClipFile, conditions


def cached_latents(
    path: Path, vae: Vae, clips: list[ClipFile], profile: Profile, report: Report
) -> Latents:
    """Return all clips as latents, from the cache `path` if encoder and clips are the same.

    Raises InputError if no clip can be read.
    """
    key = _key(vae, clips)
    with contextlib.suppress(SafetensorError, OSError, KeyError):  # missing or damaged: encode
        cached = load_file(path)
        if bytes(cached.pop("key").tolist()).hex() == key:
            return Latents(**cached)
    latents = _encoded(vae, clips, profile, report)
    key_bytes = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)
    with whole(path) as temporary:
        save_file({**vars(latents), "key": key_bytes}, temporary)
    return latents


def _key(vae: Vae, clips: list[ClipFile]) -> str:
    """Hash the encoder's weights and every clip's name, size and time."""
    stats = [(clip.path.name, clip.path.stat()) for clip in clips]
    files = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    weights = b"".join(tensor.numpy().tobytes() for tensor in vae.encoder.state_dict().values())
    return hashlib.sha256(files.encode() + weights).hexdigest()


def _encoded(vae: Vae, clips: list[ClipFile], profile: Profile, report: Report) -> Latents:
    """Encode every clip that can be read and is as long as the first one."""
    latents: Latents | None = None
    used = 0
    for index, clip in enumerate(clips):
        arrays = clip.read(profile)
        if arrays is not None:
            with torch.no_grad():
                z = vae.encode(from_pixels(torch.from_numpy(arrays["frames"]))[None])[0]
            if latents is None:  # allocate once: many small tensors between large ones fragment
                latents = _empty_latents(len(clips), z, profile)
            if z.shape == latents.z.shape[1:]:
                latents.z[used] = z
                latents.tokens[used] = torch.from_numpy(arrays["tokens"])[: profile.text.tokens]
                latents.conditions[used] = torch.from_numpy(conditions(profile, arrays["poses"]))
                used += 1
            else:
                first = latents.z.shape[1]
                clip.skip(clip.path, f"{len(z)} latent frames, the first clip has {first}")
        report(f"encoding clips: {index + 1} of {len(clips)}")
    if latents is None:
        hint = "make one with: aapt train data FOLDER"
        raise InputError("no clip of the data folder can be read", hint)
    return Latents(latents.z[:used], latents.conditions[:used], latents.tokens[:used])


def _empty_latents(clips: int, z: Tensor, profile: Profile) -> Latents:
    """Allocate float16 latents for `clips` clips like z [1 + m, C, h, w]."""
    conditions_shape = (clips, len(z) - 1, CONDITION_CHANNELS, *z.shape[2:])
    return Latents(
        torch.empty(clips, *z.shape, dtype=torch.float16),
        torch.empty(conditions_shape, dtype=torch.float16),
        torch.empty(clips, profile.text.tokens, dtype=torch.int64),
    )
