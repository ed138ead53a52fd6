"""Define what a family of checkpoints chooses: graphs, inputs and networks.

Other rooms call the family of a profile and never test which one it is. A second family is one
folder beside aapt/ and one row of FAMILIES. Only `networks` needs torch.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aapt_deploy.bundle.signature import GraphSignature
from aapt_deploy.errors import ProfileError
from aapt_deploy.profiles import Profile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aapt_deploy.models.sources import Part

FAMILIES = {  # name -> module that has a FAMILY
    "aapt": "aapt_deploy.models.aapt.family",
    "wan": "aapt_deploy.models.wan.family",
}


class Feed(Protocol):
    """The generator's inputs over one rollout, beside noise, time and caches.

    feed.start(latent)             # latent 0, the start image's, if there is one
    feed.inputs(block, controls)   # the inputs of `block`, after `controls` have moved it
    feed.keep(latent)              # the finished block's latent
    """

    def start(self, latent: np.ndarray) -> None: ...

    def inputs(self, block: int, controls: Any) -> dict[str, np.ndarray]: ...

    def keep(self, latent: np.ndarray) -> None: ...

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that passes from block to block, as named arrays."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...


class Networks(Protocol):
    """The torch half of a family."""

    def build(self, profile: Profile) -> tuple[Any, Any]:
        """Build generator and VAE with fresh weights, in evaluation mode."""
        ...

    def computed(self, profile: Profile) -> "dict[str, Tensor]":
        """Compute the generator's buffers that are not stored in checkpoints."""
        ...

    def zero_at_first(self, module: str) -> bool:
        """Return whether random weights of this module of the generator must be zero."""
        ...

    def graph_modules(self, profile: Profile, generator: Any, vae: Any) -> "dict[str, nn.Module]":
        """Return the graphs that `Family.signatures` lists, as modules."""
        ...

    def parts(self, profile: Profile) -> "list[Part]":
        """Return what `aapt import` takes from published files: generator, VAE; [] if nothing."""
        ...

    def parameters(self, graph: str, module: Any) -> "list[nn.Parameter]":
        """Return the parameters that one graph reads. Graphs may share a network."""
        ...


class Family(Protocol):
    """One kind of checkpoint. NumPy alone, but for `networks`."""

    stacks: tuple[str, ...]  # the generator's stacks of blocks: `<stack>.<block>.<layer>`
    start_is_block: bool  # the start latent is block 0 of the cache, and may be missing
    cruise: Any  # frozen dataclass of floats: the controls of a stream that nobody steers
    limits: Any  # the same class: largest magnitudes
    flights: Sequence[Any]  # the same class: motion in all directions, for calibration

    def signatures(self, profile: Profile) -> dict[str, GraphSignature]:
        """Return all graphs of a bundle by name."""
        ...

    def generator(self, profile: Profile, cache_tokens: int | None = None) -> GraphSignature:
        """Return the generator's signature, with an engine's own length of the cache if given."""
        ...

    def feed(self, profile: Profile) -> Feed: ...

    def times(self, t: float) -> dict[str, np.ndarray]:
        """Return the inputs of a pass at time t, the share of noise."""
        ...

    def temporal_turn(self, profile: Profile, frames: int) -> np.ndarray:
        """Return cosine and sine [2, P_time] that move keys on by `frames` latent frames."""
        ...

    def left_and_right(self, block: int) -> Any:
        """Return controls that turn left and right, so that a trial sees motion."""
        ...

    def text_of(self, profile: Profile, prompt: str) -> np.ndarray | None:
        """Return the prompt graph's input; None if the generator takes no text.

        Raises UsageError if the prompt is unusable.
        """
        ...

    def in_common(self, prompt: str, other: str) -> int:
        """Count the meaningful words that two prompts share."""
        ...

    def random_text(self, profile: Profile, rng: np.random.Generator) -> np.ndarray | None:
        """Draw a prompt; None if the generator takes no text."""
        ...

    def networks(self) -> Networks:
        """Import the torch half. Raises ModuleNotFoundError if torch is missing."""
        ...


def family_of(profile: Profile) -> Family:
    """Return the family of a profile's checkpoints. Raises ProfileError if its name is unknown."""
    if profile.family not in FAMILIES:
        problem = f"profile {profile.name}: family {profile.family!r} does not exist"
        raise ProfileError(problem, f"families: {', '.join(FAMILIES)}")
    family: Family = importlib.import_module(FAMILIES[profile.family]).FAMILY
    return family
