"""Define how a tensor of ours is made from tensors of a published file."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Shape = tuple[int, ...]


class Source(NamedTuple):
    """Where one of our tensors comes from."""

    theirs: tuple[str, ...]  # names in the published file
    make: Callable[..., Tensor]  # from those tensors to ours
    shape: Callable[[Shape], Shape]  # from our shape to that of each of theirs


class Part(NamedTuple):
    """The tensors that come from one file."""

    prefix: str  # of ours in a checkpoint: "generator." or "vae."
    sources: dict[str, Source]  # by our name
    unused: tuple[str, ...] = ()  # beginnings of names that the file may have besides
    option: str = ""  # of `aapt import`, that names the file; "" for its argument
    file: str = ""  # its published name
