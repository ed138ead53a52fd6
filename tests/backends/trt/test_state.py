"""Device memory beside the plans, over the emulated driver: types, places, copies."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.state import (
    ALIGNMENT,
    STORED,
    CacheLayer,
    HopperTiles,
    StagingBuffer,
    TokenMajor,
    from_bf16,
    size_of,
    to_bf16,
)
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from tests.support.cuda_emulator import Driver, Tensor

HEADS, DIM = 3, 64
RNG = np.random.default_rng(0)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def device(driver: Driver) -> cuda.Device:
    return cuda.Device(driver)


def bits(values: np.ndarray) -> np.ndarray:
    """bf16's bits by another library."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


# --- types ---


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    edges = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, 3e38, np.inf])
    for values in (edges, RNG.standard_normal((5, 7)) * 1e3, RNG.standard_normal((4, 6)).T):
        single = values.astype(np.float32)
        assert to_bf16(single).dtype == np.uint16
        np.testing.assert_array_equal(to_bf16(single), bits(single))
        np.testing.assert_array_equal(to_bf16(values), bits(single))
        there = from_bf16(to_bf16(single))
        assert there.dtype == np.float32
        np.testing.assert_array_equal(there, single.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("FLOAT", 4), ("HALF", 2), ("BF16", 2), ("FP8", 1), ("INT32", 4), ("INT64", 8), ("UINT8", 1)],
)
def test_a_tensor_takes_the_bytes_of_its_type(kind: str, size: int) -> None:
    assert size_of(Tensor("x", True, kind, (3, 5, 7))) == 105 * size  # type: ignore[arg-type]
    assert size_of(Tensor("x", True, kind, ())) == size  # type: ignore[arg-type]
    assert STORED[kind]


# --- tensors that are copied together ---

TENSORS = [
    Tensor("wide", True, "FLOAT", (3, 5, 7)),  # 420 bytes: two alignments
    Tensor("half", True, "BF16", (2, 64)),  # 256: exactly one
    Tensor("count", True, "INT64", (1,)),
    Tensor("small", True, "HALF", (2, 3)),
    Tensor("codes", True, "FP8", (5,)),
]


def test_tensors_are_aligned_in_one_buffer_of_each_side(
    driver: Driver, device: cuda.Device
) -> None:
    made = StagingBuffer(device, TENSORS)  # type: ignore[arg-type]
    offsets = {name: address - made.address for name, address in made.addresses.items()}
    assert offsets == {"wide": 0, "half": 512, "count": 768, "small": 1024, "codes": 1280}
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert made.host.nbytes == driver.held[made.address].nbytes == 1536
    for tensor in TENSORS:
        array = made.arrays[tensor.name]
        assert array.shape == tensor.shape and array.dtype == STORED[tensor.dtype]
        begin = array.ctypes.data - made.host.ctypes.data
        assert begin == offsets[tensor.name] and np.shares_memory(array, made.host)


def test_values_are_written_in_the_plans_types_and_read_as_float32(device: cuda.Device) -> None:
    made = StagingBuffer(device, TENSORS)  # type: ignore[arg-type]
    wide = RNG.standard_normal((3, 5, 7)).astype(np.float32)
    half = RNG.standard_normal((2, 64)).astype(np.float32)
    small = RNG.standard_normal((2, 3)).astype(np.float32)
    made.write({"wide": wide, "half": half, "count": 2**40, "small": small, "codes": 7})
    np.testing.assert_array_equal(made.arrays["half"], bits(half))
    np.testing.assert_array_equal(made.arrays["small"], small.astype(np.float16))
    assert made.arrays["count"].tolist() == [2**40] and made.arrays["codes"].tolist() == [7] * 5
    found = made.read()
    np.testing.assert_array_equal(found["wide"], wide)
    rounded = {"half": (half, ml_dtypes.bfloat16), "small": (small, np.float16)}
    for name, (values, kind) in rounded.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values.astype(kind).astype(np.float32))
    assert found["count"].dtype == np.int64 and found["codes"].dtype == np.uint8
    made.write({"count": 3})
    np.testing.assert_array_equal(made.arrays["half"], bits(half))


# --- caches of rows ---


def layers_of(device: cuda.Device, cache: int, block: int, count: int = 2) -> list[CacheLayer]:
    sizes = (cache, cache, block, block)
    return [CacheLayer(*(device.memory(size) for size in sizes)) for _ in range(count)]


def test_a_block_is_copied_to_the_rows_of_its_slot_in_every_layer(
    driver: Driver, device: cuda.Device
) -> None:
    row, tokens, stream = 6, 3, device.stream()
    layers = layers_of(device, 10 * row, tokens * row)
    wanted = []
    for number, layer in enumerate(layers):
        for place, (address, size) in enumerate(zip(layer, (60, 60, 18, 18), strict=True)):
            driver.view(address, size)[:] = 0 if place < 2 else 10 * number + place
        wanted.append([np.zeros(60, np.uint8) for _ in range(2)])
    caches = TokenMajor(stream, layers, "BF16", row, tokens)
    for slot in (2, 7):
        caches.commit(slot)
        for number, pair in enumerate(wanted):
            for place, array in enumerate(pair):
                array[slot * row : (slot + tokens) * row] = 10 * number + place + 2
    stream.wait()
    for layer, pair in zip(layers, wanted, strict=True):
        for address, array in zip(layer[:2], pair, strict=True):
            np.testing.assert_array_equal(driver.view(address, 60), array)


WIDE = [(kind, given) for kind in ("BF16", "FLOAT", "HALF") for given in ("float32", "bf16", "own")]


@pytest.mark.parametrize(("kind", "given"), [*WIDE, ("FP8", "own")])
def test_text_goes_to_the_front_in_the_caches_own_type(
    driver: Driver, device: cuda.Device, kind: str, given: str
) -> None:
    stored: Any = STORED[kind]
    k, v = (RNG.standard_normal((1, 2, 3, 4)).astype(np.float32) for _ in range(2))
    if given == "own":
        passed = [np.asfortranarray((100 * x).astype(stored)) for x in (k, v)]
        wanted = [np.ascontiguousarray(x) for x in passed]
    else:
        plain = [from_bf16(bits(x)) if given == "bf16" else x for x in (k, v)]
        passed = [bits(x) if given == "bf16" else x for x in (k, v)]
        wanted = [bits(x) if kind == "BF16" else x.astype(stored) for x in plain]
    size = 24 * np.dtype(stored).itemsize
    stream, (layer, other) = device.stream(), layers_of(device, 2 * size, 8)
    TokenMajor(stream, [layer, other], kind, 8, 1).write_text(layer, *passed)
    assert not driver.streams[stream.handle], "the upload was waited for"
    for address, values in zip(layer[:2], wanted, strict=True):
        found = driver.array(address, values.shape, stored)
        np.testing.assert_array_equal(found, values)
        assert (driver.view(address + size, size) == 0xFF).all()
    assert (driver.view(other.k_cache, 2 * size) == 0xFF).all()


# --- caches of tiles ---


def scales_of(seed: int) -> hopper_fp8.Scales:
    rng = np.random.default_rng(seed)
    of_head = [rng.uniform(0.005, 0.01, HEADS).astype(np.float32) for _ in range(2)]
    of_channel = [rng.standard_normal((HEADS, DIM)).astype(np.float32) for _ in range(2)]
    return hopper_fp8.Scales(*of_head, of_channel[0], np.abs(of_channel[1]) / 100 + 0.005)


class Launches:
    """In the place of our kernels: packs and commits as the layout says, when its turn comes."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.seen = driver, list[str]()

    def __call__(self, kernel: str, inputs: Any, numbers: Any, outputs: Any, stream: int) -> None:
        self.seen.append(kernel)
        act = {"aapt_pack": self.pack, "aapt_commit": self.commit}[kernel]
        self.driver.queue(stream, lambda: act(list(inputs), tuple(numbers), list(outputs)))

    def image(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.driver.array(address, shape, np.uint8)

    def pack(self, inputs: list[int], numbers: tuple[int, ...], outputs: list[int]) -> None:
        tokens, heads = numbers
        k, v = (
            from_bf16(self.driver.array(x, (tokens, heads, DIM), np.uint16)) for x in inputs[:2]
        )
        sizes = ((heads,), (heads, DIM), (heads, DIM))
        k_scale, k_mean, v_scale = (
            self.driver.array(address, size, np.float32)
            for address, size in zip(inputs[2:], sizes, strict=True)
        )
        made = hopper_fp8.pack(k, v, hopper_fp8.Scales(k_scale, k_scale, k_mean, v_scale))
        shape = hopper_fp8.image_shape(heads, tokens, DIM)
        for address, image in zip(outputs, made, strict=True):
            self.image(address, shape)[...] = image

    def commit(self, inputs: list[int], numbers: tuple[int, ...], outputs: list[int]) -> None:
        tokens, heads, cache_tiles = numbers
        block = (heads, hopper_fp8.tiles(tokens), 64 * DIM)
        images = [self.image(address, block) for address in inputs[:2]]
        slot = int(self.driver.array(inputs[2], (1,), np.int32)[0])
        caches = [self.image(address, (heads, cache_tiles, 64 * DIM)) for address in outputs]
        hopper_fp8.commit(*images, tokens, slot, *caches)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("text", [0, 5])
def test_tiles_take_a_prompts_text_and_every_blocks_tokens(
    driver: Driver, device: cuda.Device, text: int, captured: bool
) -> None:
    ring, stream, launch = Ring(text, 70, 0, 2), device.stream(), Launches(driver)
    cache = hopper_fp8.image_shape(HEADS, ring.tokens, DIM)
    block = hopper_fp8.image_shape(HEADS, 70, DIM)
    layers, scales = (
        layers_of(device, math.prod(cache), math.prod(block)),
        [scales_of(1), scales_of(2)],
    )
    wanted = [[np.zeros(cache, np.uint8) for _ in range(2)] for _ in layers]
    blocks = []
    for seed, layer in enumerate(layers):
        for address in layer[:2]:
            driver.view(address, math.prod(cache))[:] = 0
        k, v = RNG.standard_normal((2, 70, HEADS, DIM)).astype(np.float32)
        blocks.append(hopper_fp8.pack(k, v, scales[seed]))
        for address, image in zip(layer[2:], blocks[-1], strict=True):
            driver.array(address, block, np.uint8)[...] = image
    made = HopperTiles(device, stream, launch, layers, scales, ring, captured)
    for layer, pair in zip(layers, wanted, strict=True):  # the first run commits to slot 0
        for address in layer[:2]:
            driver.view(address, math.prod(cache))[:] = 0
        assert not any(image.any() for image in pair)
    device.seal()
    for slot in (text, text + 70):
        made.commit(slot)
        stream.wait()
        for pair, images in zip(wanted, blocks, strict=True):
            hopper_fp8.commit(*images, 70, slot, *pair)
    if text:
        k, v = RNG.standard_normal((2, 1, text, HEADS, DIM)).astype(np.float32)
        made.write_text(layers[1], k, bits(v))
        rounded = [from_bf16(bits(x))[0] for x in (k, v)]
        hopper_fp8.commit(*hopper_fp8.pack(*rounded, scales[1]), text, 0, *wanted[1])
    assert not driver.streams[stream.handle]
    for layer, pair in zip(layers, wanted, strict=True):
        for address, image in zip(layer[:2], pair, strict=True):
            np.testing.assert_array_equal(driver.array(address, cache, np.uint8), image)
    commits = launch.seen.count("aapt_commit")
    assert commits == 2 * (2 if captured else 3) + bool(text)
    assert launch.seen.count("aapt_pack") == bool(text)


def test_every_layer_has_scales(driver: Driver, device: cuda.Device) -> None:
    layers = layers_of(device, 64, 64)
    with pytest.raises(AssertionError, match=r"len\(scales\)=1 len\(layers\)=2"):
        HopperTiles(
            device, device.stream(), Launches(driver), layers, [scales_of(1)], Ring(0, 70, 0, 2),
            True,
        )  # fmt: skip
