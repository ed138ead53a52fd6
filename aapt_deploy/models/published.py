"""Published checkpoint files: which preset each one needs, and which ones are refused.

Sizes and hashes are those of the files' download pages. A file is recognised by its hash, else by
its size, which several may share. Nothing here opens a file or a connection.
"""

import re
from typing import NamedTuple


class Known(NamedTuple):
    """One published file."""

    title: str
    place: str  # repository on the Hugging Face hub, and the file in it
    bytes: int  # 0: not known
    sha256: str  # its beginning; "" if not known
    preset: str  # without the target
    lora_alpha: float | None = None  # of the preset's LoRA, which has no alpha inside


_CF = "zhuhz22/Causal-Forcing"
KNOWN = (
    Known("Causal-Forcing++ 1-step", f"{_CF}: causal-forcing++/framewise-1step.pt",
          5_676_220_819, "bdb1b475", "causal-forcing-1step-832x480"),
    Known("Causal-Forcing++ 2-step", f"{_CF}: causal-forcing++/framewise-2step.pt",
          5_676_220_819, "8f899a01", "causal-forcing-2step-832x480"),
    Known("Causal-Forcing chunk-wise", f"{_CF}: chunkwise/causal_forcing.pt",
          5_676_282_643, "cf75ee5c", "causal-forcing-chunk-832x480"),
    Known("Self-Forcing", "gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt",
          0, "", "self-forcing-832x480"),
    Known("LongLive 1.0", "Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt",
          0, "", "longlive-832x480", 256.0),
)  # fmt: skip

# A pattern of the file's name or folder -> why no preset can run it.
REFUSED = {
    r"rolling.?forcing": "Rolling Forcing denoises five blocks at five noise levels in one pass",
    r"longvideo": "this Causal-Forcing file needs Rolling Forcing's sampler, five blocks a pass",
    r"reward.?forcing": "Reward Forcing's sink is a moving average of evicted, unrotated keys",
    r"krea": "Krea Realtime computes its cache again from clean latents before each block",
    r"wan.?2\.?2|longlive.?2": "Wan2.2 and LongLive 2 have another VAE, of 48 channels",
}
# Channels that a patch embedding takes -> why no preset has them.
REFUSED_CHANNELS = {
    36: "image-to-video weights with 36 input channels take a mask and an image latent",
    48: "latents of 48 channels are Wan2.2's, which has another VAE",
}


def refused(path: str) -> str:
    """Return why the file at `path` cannot be imported, by its name; "" if it can."""
    name = "/".join(path.split("/")[-3:]).lower()
    return next((why for pattern, why in REFUSED.items() if re.search(pattern, name)), "")


def recognised(size: int, sha256: str) -> list[Known]:
    """Return the published files with this hash, else those of this size and unlike hashes."""
    if exact := [known for known in KNOWN if known.sha256 and sha256.startswith(known.sha256)]:
        return exact
    return [known for known in KNOWN if known.bytes == size > 0 and not known.sha256]


def lora_alpha(profile: str) -> float | None:
    """Return the alpha of the LoRA that belongs to a preset; None if it has none."""
    own = (known.lora_alpha for known in KNOWN if profile.startswith(known.preset))
    return next(own, None)
