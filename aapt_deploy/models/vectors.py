"""Read a prompt that a text encoder has turned into vectors, from a .npy file."""

from typing import Any

import numpy as np

from aapt_deploy.errors import UsageError
from aapt_deploy.profiles import Profile


def vectors(profile: Profile, prompt: str) -> np.ndarray:
    """Read float32 [1, L, dim] from the .npy file `prompt` of a text encoder; zeros for "".

    Raises UsageError if the file is unusable.
    """
    text = profile.text
    made = np.zeros((1, text.tokens, text.dim), np.float32)
    if not prompt:
        return made
    hint = (
        f"profile {profile.name} takes vectors of a text encoder: "
        f"name a .npy file of float32 [{text.tokens}, {text.dim}]"
    )
    try:
        # Maps the file: only its header is read before the check of the shape.
        found: Any = np.load(prompt, mmap_mode="r", allow_pickle=False)
        dtype, shape = getattr(found, "dtype", "no array"), getattr(found, "shape", ())
        array = isinstance(found, np.ndarray) and found.dtype.kind == "f"
        if not array or shape not in (made.shape, made.shape[1:]):
            raise ValueError(f"it holds {dtype} {list(shape)}")
        made[0] = found
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"prompt {prompt!r} cannot be read: {error}", hint) from None
    if not np.isfinite(made).all():
        raise UsageError(f"prompt {prompt!r} holds numbers that are not finite", hint)
    return made
