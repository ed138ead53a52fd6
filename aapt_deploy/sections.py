"""The sections of a profile, one frozen dataclass each, and the range of every size.

`profiles.py` reads, checks and writes them. A field with a default may be left out of a preset.
"""

from dataclasses import dataclass

CONDITION_CHANNELS = 6  # camera ray origin (3) and direction (3), AAPT App. G
PIXEL_CHANNELS = 3
TIME_DOUBLINGS = 2  # of the VAE's scales next to the latent: 4 frames per latent frame


@dataclass(frozen=True)
class Model:
    """The generator's transformer."""

    dim: int  # width of both streams
    depth: int  # transformer blocks
    heads: int  # attention heads; head_dim = dim / heads
    patch: int  # latent pixels per token side
    mlp_ratio: int = 4  # hidden width of the MLP / dim, unless `ffn` is set
    ffn: int = 0  # hidden width of the MLP; 0: mlp_ratio * dim
    halo: int = 0  # latent pixels that a token sees around its patch; the paper has none


@dataclass(frozen=True)
class Text:
    """The prompt as the generator reads it."""

    kind: str  # "vocabulary": an id per attribute word; "embedding": an external encoder's vectors
    tokens: int  # of a prompt; 0 for a generator without text
    dim: int  # width of one text token before it enters the generator
    attention: str = "joint"  # with the cache, whose front is the text; or "cross", beside it
    replay: bool = False  # a new prompt is read by the window's blocks too: one pass for each


@dataclass(frozen=True)
class Video:
    """Pixels, and the latent that they are encoded to (causal VAE, MAGViT-2 style)."""

    width: int  # pixels
    height: int  # pixels
    fps: int  # frames shown per second
    latent_channels: int
    spatial_stride: int = 8  # pixels per latent pixel side
    temporal_stride: int = 4  # frames per latent frame
    block_frames: int = 1  # latent frames that are generated together


@dataclass(frozen=True)
class Window:
    """The latent frames that a block attends to."""

    frames: int  # past latent frames in the ring (the paper's N), whole blocks of them
    sink_frames: int = 1  # first latent frames that are never overwritten, whole blocks of them
    sink_follows: bool = False  # the sink's temporal positions move along with the window
    trained_frames: int = 0  # latent frames of a training video; 0: streams may be endless


@dataclass(frozen=True)
class Sampler:
    """Generator passes per block, from noise down; `[1.0]` is AAPT's one-step generator."""

    timesteps: tuple[float, ...]  # shares of noise
    temperature: float = 1.0  # deviation of a block's first noise; less is calmer and softer
    kind: str = "bent"  # along the flow; or "renoise": fresh noise on each pass's clean latent
    first_block: tuple[float, ...] = ()  # timesteps of the first generated block, if they differ
    write: bool = False  # one more pass, at time 0, fills the cache from the clean latent

    @property
    def draws(self) -> bool:
        """Return True if sampling draws noise of its own, after a block's first."""
        return self.kind == "renoise" and max(len(self.timesteps), len(self.first_block)) > 1


@dataclass(frozen=True)
class Vae:
    """The causal VAE's convolutions; channels have one entry per scale."""

    encoder_channels: tuple[int, ...]  # to the latent; empty: a linear patch path, for PCA to start
    decoder_channels: tuple[int, ...]  # from the latent to pixels
    blocks: int  # residual blocks per scale
    temporal_kernel: int  # frames seen by a causal convolution
    look_back: str = "first"  # decoder convolutions with a past: a block's "first", or "all"
    kind: str = "aapt"  # whose layers these are: "aapt", "wan" or "taehv"


@dataclass(frozen=True)
class Precision:
    """Number formats of the engine that the target runs."""

    compute: str  # activations outside the quantised products
    weights: str  # weights of linear and convolution layers
    kv_cache: str  # keys and values in the caches


@dataclass(frozen=True)
class Target:
    """The machine this profile is tuned for."""

    device: str  # "cpu" or "cuda"
    name: str  # "2 CPU cores", "H100"
    sm: int = 0  # CUDA compute capability x 10; 0 on a CPU
    memory_gb: int = 0  # device memory the plan may use; 0: not checked


@dataclass(frozen=True)
class Quality:
    """The most that a precision may cost, for `aapt quality`; the section is optional."""

    latent_error: float = 0.10  # most, of a teacher-forced pass, relative to the latent's size
    psnr_db: float = 30.0  # least, free-running, over the first second
    ssim: float = 0.90  # least, over the same
    drift_per_s: float = 0.05  # largest slope of the drift, per second
    drift: float = 0.15  # most, of sharpness or brightness over the rollout, as a share


@dataclass(frozen=True)
class Fp8:
    """Linear layers that stay out of FP8, and its calibration; the section is optional."""

    # Paths in the generator: * for anything, `first` and `last` for those blocks. By default
    # embeddings and modulation. Convolutions, the head's too, always stay.
    keep: tuple[str, ...] = ("text_in", "time_*", "*.first.*", "*.last.*")
    margin: float = 1.1  # largest magnitude of a scale, relative to the largest one seen


PRECISIONS = ("fp32", "bf16", "fp8_e4m3", "int8")
LARGEST = {  # far above any real profile; with all of them, counts of bytes still fit 64 bits
    "dim": 1 << 16, "depth": 1 << 10, "heads": 1 << 10, "patch": 1 << 6, "mlp_ratio": 1 << 6,
    "ffn": 1 << 20, "halo": 1 << 6, "tokens": 1 << 16, "width": 1 << 14, "height": 1 << 14,
    "fps": 1000,
    "latent_channels": 1 << 10, "spatial_stride": 1 << 8, "temporal_stride": 1 << 8,
    "frames": 10_000, "trained_frames": 1 << 20, "sink_frames": 10_000, "block_frames": 100,
    "encoder_channels": 1 << 14, "decoder_channels": 1 << 14, "blocks": 1 << 6,
    "temporal_kernel": 1 << 6, "sm": 10_000, "memory_gb": 1 << 20,
}  # fmt: skip
MAY_BE_ZERO = ("ffn", "halo", "tokens", "sink_frames", "trained_frames", "sm", "memory_gb")
