"""Launches of the CUDA kernels: their ABI, the variants of attention, and their shapes."""

from typing import NamedTuple

from aapt_deploy.ops.block_causal_attention.hopper_fp8 import TILE_KEYS, tiles

QUERY_ROWS = 128  # of one thread block of aapt_attend


class Abi(NamedTuple):
    """Parameters of one kernel in their order, the flat ABI of TensorRT's AOT plugins."""

    inputs: tuple[str, ...]  # device pointers
    numbers: tuple[str, ...]  # int32
    outputs: tuple[str, ...]  # device pointers


_SCALES = ("q_scale", "k_scale", "v_scale")
_IMAGE, _CACHES = ("k_block", "v_block"), ("k_cache", "v_cache")
_READ = ("q", *_IMAGE, *_CACHES, "cache_len", *_SCALES)
_SIZES = ("T", "H", "cache_tiles")
ABI = {
    "aapt_pack": Abi(("k", "v", "k_scale", "k_mean", "v_scale"), ("T", "H"), _IMAGE),
    "aapt_attend": Abi(_READ, _SIZES, ("out",)),
    "aapt_commit": Abi((*_IMAGE, "slot"), _SIZES, _CACHES),
}


class Variant(NamedTuple):
    """A form of aapt_attend. All compute the same bits and differ in how tiles are copied."""

    deep: bool = False  # a ring of 90 KB, in place of one within 48
    dynamic: bool = False  # the ring in dynamic shared memory, which the launch asks for
    prefetch: int = 8  # visits by which tiles are copied to L2 ahead of their use; 0: never
    loads_first: bool = True  # all queries are loaded before the first is divided

    def ring(self, head_dim: int) -> tuple[int, int]:
        """Return how many tiles of K and of V fit into shared memory."""
        k, v = (6, 5) if self.deep else (3, 2)
        return (k, v) if head_dim == 128 else (2 * k, 2 * v)

    def defines(self, head_dim: int) -> tuple[str, ...]:
        """Return macros for the source, as NAME=VALUE; none for its default form."""
        if self == DEFAULT:
            return ()
        k, v = self.ring(head_dim)
        return (
            f"AAPT_RING_K={k}", f"AAPT_RING_V={v}", f"AAPT_DYNAMIC={self.dynamic:d}",
            f"AAPT_PREFETCH={self.prefetch}", f"AAPT_LOADS_FIRST={self.loads_first:d}",
        )  # fmt: skip

    def dynamic_bytes(self, head_dim: int) -> int:
        """Return the dynamic shared memory of a launch: tiles, barriers, room to align them."""
        return sum(self.ring(head_dim)) * (TILE_KEYS * head_dim + 16) + 1024 if self.dynamic else 0


DEFAULT = Variant()
# By name, for comparison in one run (bench/attention.py); the first is the plainest.
VARIANTS = {
    "as first written": Variant(prefetch=0, loads_first=False),
    "loads first": Variant(prefetch=0),
    "prefetch 8": DEFAULT,
    "K6V5": Variant(deep=True, dynamic=True, prefetch=0),
    "K6V5, prefetch 8": Variant(deep=True, dynamic=True),
    "K6V5 static": Variant(deep=True, prefetch=0),
}


class Shape(NamedTuple):
    """A launch: thread blocks along x and y, threads of each."""

    x: int
    y: int
    threads: int


def launch_shape(kernel: str, tokens: int, heads: int) -> Shape:
    """Return the launch of `kernel` for a block of T tokens and H heads."""
    if kernel == "aapt_attend":
        return Shape(-(-tokens // QUERY_ROWS), heads, 384)
    touched = tiles(tokens) + (kernel == "aapt_commit")  # one more if it begins inside a tile
    return Shape(touched, heads, 256)
