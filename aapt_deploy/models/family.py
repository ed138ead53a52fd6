"""What a family of checkpoints chooses, and nothing else: graphs, inputs, sampler, controls, networks.

rollout, engines, latency, cost and build ask the family of a profile; none asks which one it is.
A second family is one folder beside aapt/ and one row of FAMILIES. Torch is needed for networks only.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.profiles import Profile

if TYPE_CHECKING:
    from torch import Tensor, nn

FAMILIES = {"aapt": "aapt_deploy.models.aapt.family"}  # name -> module that has a FAMILY

Clean = Callable[[Any, float], Any]  # (noisy, time) -> the clean latent that the generator predicts


class Feed(Protocol):
    """The generator's inputs over one rollout, beside noise, time and caches.

    feed.start(latent)                    latent 0, the start image's
    feed.inputs(block, controls)          what holds for `block`; moves what the controls move
    feed.keep(latent)                     the block is done, and this is its latent
    """

    def start(self, latent: np.ndarray) -> None: ...

    def inputs(self, block: int, controls: Any) -> dict[str, np.ndarray]: ...

    def keep(self, latent: np.ndarray) -> None: ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything it carries from block to block, as named arrays."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...


class Networks(Protocol):
    """The torch half of a family."""

    def build(self, profile: Profile) -> tuple[Any, Any]:
        """Generator and VAE with fresh weights, in evaluation mode."""
        ...

    def computed(self, profile: Profile) -> "dict[str, Tensor]":
        """The generator's buffers that are computed from the profile and stored nowhere."""
        ...

    def zero_at_first(self, module: str) -> bool:
        """Whether random weights of this module of the generator must be zero."""
        ...

    def graph_modules(self, profile: Profile, generator: Any, vae: Any) -> "dict[str, nn.Module]":
        """The graphs that `Family.signatures` lists, as modules."""
        ...

    def parameters(self, graph: str, module: Any) -> "list[nn.Parameter]":
        """The parameters that one graph reads: graphs may share a network."""
        ...


class Family(Protocol):
    """One kind of checkpoint. NumPy alone, but for `networks`."""

    stacks: tuple[str, ...]  # the generator's stacks of blocks: `<stack>.<block>.<layer>`
    write_time: float | None  # time of one more pass that only fills the cache; None: no such pass
    draws: bool  # `sample` draws noise of its own, so a block's noise cannot be drawn ahead
    cruise: Any  # frozen dataclass of floats: what steers a stream until it is told otherwise
    limits: Any  # the same class: largest magnitudes
    flights: Sequence[Any]  # the same class: motion in all directions, for calibration

    def signatures(self, profile: Profile) -> dict[str, GraphSignature]:
        """All graphs of a bundle by name."""
        ...

    def generator(self, profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
        """The generator's signature; `cache_tokens` if an engine's cache is longer than the op's."""
        ...

    def feed(self, profile: Profile) -> Feed: ...

    def sample(self, clean: Clean, x: Any, profile: Profile, rng: np.random.Generator) -> Any:
        """From noise x to a clean latent, one call of `clean` per pass."""
        ...

    def left_and_right(self, block: int) -> Any:
        """Controls that turn left and right, so that a trial sees motion."""
        ...

    def text_of(self, profile: Profile, prompt: str) -> np.ndarray | None:
        """What the prompt graph reads; None if the generator takes no text.

        Raises UsageError for a prompt that cannot be used.
        """
        ...

    def in_common(self, prompt: str, other: str) -> int:
        """How many words of meaning two prompts share."""
        ...

    def random_text(self, profile: Profile, rng: np.random.Generator) -> np.ndarray | None:
        """A prompt that is drawn; None if the generator takes no text."""
        ...

    def networks(self) -> Networks:
        """The torch half. Raises ModuleNotFoundError without torch."""
        ...


def family_of(profile: Profile) -> Family:
    """The family of a profile's checkpoints."""
    family: Family = importlib.import_module(FAMILIES[profile.family]).FAMILY
    return family
