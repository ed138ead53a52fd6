"""Device memory beside the plans: inputs, outputs and the caches in two layouts.

    StagingBuffer   tensors of one direction: a buffer on the host, one on the device, one copy
    TokenMajor      caches [1, S, H, D]; a block is committed by copies into its rows
    HopperTiles     caches of e4m3 tiles; our kernels commit a block and pack a prompt's text

Nothing here waits for a pass, reads a plan, or decides when a block is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aapt_deploy.backends.trt.cuda import Device, Stream
from aapt_deploy.backends.trt.plans import Tensor
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8

ALIGNMENT = 256  # of tensors on the device, bytes
STORED = {  # TensorRT's type -> NumPy's; BF16 as its bits
    "FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "FP8": np.uint8,
    "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
}  # fmt: skip

# A kernels.Kernels: kernel, inputs, numbers, outputs, stream.
Launch = Callable[[str, Sequence[int], Sequence[int], Sequence[int], int], None]


def to_bf16(values: Any) -> np.ndarray:
    """Convert float32 to the bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Convert the bits of bf16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def size_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(STORED[tensor.dtype]).itemsize


class StagingBuffer:
    """Tensors that are copied together: one pinned buffer, one on the device."""

    def __init__(self, device: Device, tensors: Sequence[Tensor]) -> None:
        self.kinds = {tensor.name: tensor.dtype for tensor in tensors}
        offsets, size = {}, 0
        for tensor in tensors:
            offsets[tensor.name] = size
            size += -(-size_of(tensor) // ALIGNMENT) * ALIGNMENT
        self.host, self.address = device.pinned((size,), np.uint8), device.memory(size)
        self.addresses = {name: self.address + offset for name, offset in offsets.items()}
        self.arrays = {}
        for tensor in tensors:
            begin = offsets[tensor.name]
            part = self.host[begin : begin + size_of(tensor)].view(STORED[tensor.dtype])
            self.arrays[tensor.name] = part.reshape(tensor.shape)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write values for the next upload, in the types that the plan reads."""
        for name, value in values.items():
            self.arrays[name][...] = to_bf16(value) if self.kinds[name] == "BF16" else value

    def read(self) -> dict[str, np.ndarray]:
        """Return copies of what the last download brought; half precisions as float32."""
        return {name: _plain(array, self.kinds[name]) for name, array in self.arrays.items()}


def _plain(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "BF16":
        return from_bf16(array)
    return array.astype(np.float32) if kind == "HALF" else array


class CacheLayer(NamedTuple):
    """Device addresses of one layer's tensors."""

    k_cache: int
    v_cache: int
    k_block: int
    v_block: int


class TokenMajor:
    """Caches [1, S, H, D] in the plan's type; blocks and text are runs of rows.

    FP8 caches hold codes, and the plans compute those of blocks and text.
    """

    def __init__(
        self, stream: Stream, layers: list[CacheLayer], kind: str, row_bytes: int, tokens: int
    ) -> None:
        self.stream, self.layers, self.kind = stream, layers, kind
        self.row_bytes, self.tokens = row_bytes, tokens

    def commit(self, slot: int) -> None:
        for layer in self.layers:
            for cache, block in ((layer.k_cache, layer.k_block), (layer.v_cache, layer.v_block)):
                self.stream.copy(cache + slot * self.row_bytes, block, self.tokens * self.row_bytes)

    def write_text(self, layer: CacheLayer, k: np.ndarray, v: np.ndarray) -> None:
        """Copy k, v [1, L, H, D] to the front: the cache's own type, or float32 unless FP8."""
        for cache, values in ((layer.k_cache, k), (layer.v_cache, v)):
            self.stream.upload(cache, stored(values, self.kind))
        self.stream.wait()  # before what was converted goes away


class HopperTiles:
    """Caches of e4m3 tiles, moved by our kernels.

    The block's slot is in device memory, so one captured graph commits to every place.
    """

    def __init__(
        self, device: Device, stream: Stream, launch: Launch, layers: list[CacheLayer],
        scales: list[hopper_fp8.Scales], ring: Ring, captured: bool,
    ) -> None:  # fmt: skip
        assert len(scales) == len(layers), f"{len(scales)=} {len(layers)=}"
        self.stream, self.launch, self.layers = stream, launch, layers
        self.tokens, self.text = ring.block_tokens, ring.text_tokens
        self.heads, head_dim = scales[0].k_mean.shape
        self.cache_tiles = hopper_fp8.tiles(ring.tokens)
        self.slot, self.slot_address = device.pinned((1,), np.int32), device.memory(ALIGNMENT)
        if self.text:
            self.front = device.memory(ALIGNMENT)  # text begins at token 0
            size = 2 * self.text * self.heads * head_dim  # of k, and of v, in bf16
            self.values = [device.memory(size) for _ in range(2)]
            image = math.prod(hopper_fp8.image_shape(self.heads, self.text, head_dim))
            self.images = [device.memory(image) for _ in range(2)]
            fields = [(s.k_scale, s.k_mean, s.v_scale) for s in scales]
            self.scales = [[self._constant(device, array) for array in row] for row in fields]
            stream.zero(self.front, ALIGNMENT)
        self.committing = stream.prepare(self._commit, captured)

    def _constant(self, device: Device, array: np.ndarray) -> int:
        values = np.ascontiguousarray(array, np.float32)
        address = device.memory(values.nbytes)
        self.stream.upload(address, values)
        self.stream.wait()
        return address

    def _commit(self) -> None:
        self.stream.upload(self.slot_address, self.slot)
        for layer in self.layers:
            self._move((layer.k_block, layer.v_block), self.slot_address, self.tokens, layer)

    def _move(self, images: Sequence[int], slot: int, tokens: int, layer: CacheLayer) -> None:
        numbers = (tokens, self.heads, self.cache_tiles)
        caches = (layer.k_cache, layer.v_cache)
        self.launch("aapt_commit", (*images, slot), numbers, caches, self.stream.handle)

    def commit(self, slot: int) -> None:
        self.slot[0] = slot  # free to change: this is the first commit since a pass and its wait
        self.committing()

    def write_text(self, layer: CacheLayer, k: np.ndarray, v: np.ndarray) -> None:
        """Quantise k, v [1, L, H, D], float32 or bf16's bits, to the front of the cache."""
        halves = [stored(values, "BF16") for values in (k, v)]
        for address, values in zip(self.values, halves, strict=True):
            self.stream.upload(address, values)
        k_scale, k_mean, v_scale = self.scales[self.layers.index(layer)]
        inputs, numbers = (*self.values, k_scale, k_mean, v_scale), (self.text, self.heads)
        self.launch("aapt_pack", inputs, numbers, self.images, self.stream.handle)
        self._move(self.images, self.front, self.text, layer)
        self.stream.wait()  # before what was converted goes away


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Convert to the device's type; return arrays of that type as they are."""
    if values.dtype == STORED[kind]:
        return np.ascontiguousarray(values)
    assert kind != "FP8", f"{values.dtype} for caches of FP8 codes"
    plain = from_bf16(values) if values.dtype == np.uint16 else values
    return to_bf16(plain) if kind == "BF16" else np.ascontiguousarray(plain, STORED[kind])
