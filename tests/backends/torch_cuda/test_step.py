"""The pieces of a pass: what a linear layer hands to its product, and what the caches hold."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aapt_deploy.backends.torch_cuda.kernels import AttentionScales, on_gpu, plain
from aapt_deploy.backends.torch_cuda.step import Narrow, Tiles, Tokens, Wide
from aapt_deploy.ops import fused, fused_triton
from aapt_deploy.ops.block_causal_attention import Ring, cuda_op, hopper_fp8, triton_op
from aapt_deploy.profiles import Profile, Text, load
from tests.support.commands import recorded

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = load("tiny-cpu")
ROWS, INPUTS, OUTPUTS = 7, 24, 40


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias)


# --- linear layers ---


def test_a_wide_layer_has_the_type_of_the_activations() -> None:
    wide, x = Wide(layer(), torch.bfloat16), torch.randn(ROWS, INPUTS)
    assert wide.weight.dtype == wide.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert not wide.weight.requires_grad and not wide.bias.requires_grad  # type: ignore[union-attr]
    assert Wide(layer(bias=False), torch.float32).bias is None
    same = Wide(layer(), torch.float32)
    assert torch.equal(same(x), nn.functional.linear(x, layer().weight, layer().bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_row", [True, False])
def test_a_narrow_layer_gives_its_product_the_scales_that_it_takes(
    by_row: bool, bias: bool
) -> None:
    """One for each row of both, or one for all of both; the bias in the result's type."""
    seen: list[tuple[Any, ...]] = []

    def product(*given: Any) -> Tensor:
        seen.append(given)
        return torch.zeros(ROWS, OUTPUTS, dtype=torch.bfloat16)

    held, of_input = layer(bias), torch.tensor([0.25])
    of_weight = torch.linspace(0.01, 0.02, OUTPUTS)
    narrow = Narrow(
        held, of_input, of_weight, ROWS, dataclasses.replace(plain(), product=product),
        torch.bfloat16, by_row,
    )  # fmt: skip
    assert narrow.step is of_input
    codes = torch.zeros(ROWS, INPUTS).to(torch.float8_e4m3fn)
    narrow(codes)
    ((x, weight, x_scale, weight_scale, added, dtype),) = seen
    own = of_weight if by_row else of_weight.max().expand(OUTPUTS)
    expected = (held.weight.detach() / own[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert x is codes and dtype == torch.bfloat16
    assert torch.equal(weight.float(), expected.float())
    if by_row:
        assert torch.equal(x_scale, torch.full((ROWS, 1), 0.25)) and x_scale.is_contiguous()
        assert torch.equal(weight_scale, of_weight[None]) and weight_scale.is_contiguous()
    else:
        assert x_scale is of_input
        assert torch.equal(weight_scale, of_weight.max()[None]) and weight_scale.is_contiguous()
    if bias:
        assert torch.equal(added, held.bias.detach().bfloat16()) and not added.requires_grad
    else:
        assert added is None
    with pytest.raises(AssertionError, match=r"x\.dtype=torch\.float32"):
        narrow(torch.zeros(ROWS, INPUTS))


# --- caches ---


def profile_of(heads: int = 3, depth: int = 2, text: int = 5) -> Profile:
    model = dataclasses.replace(TINY.model, dim=64 * heads, heads=heads, depth=depth)
    return TINY.replace(model=model, text=Text("vocabulary", text, 16))


def drawn(tokens: int, profile: Profile, seed: int) -> tuple[Tensor, Tensor]:
    """k and v [1, T, H, D]."""
    rng = torch.Generator().manual_seed(seed)
    shape = (1, tokens, profile.model.heads, profile.head_dim)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def test_token_caches_have_room_for_a_block_that_is_skipped() -> None:
    profile = profile_of()
    cache = Tokens(profile, plain(), torch.bfloat16, META)
    rows, frame = profile.cache_tokens, profile.frame_tokens
    assert len(cache.caches) == len(cache.blocks) == 2
    assert {x.shape for x in cache.caches} == {(2, 1, rows + frame, 3, 64)}
    assert {x.shape for x in cache.blocks} == {(2, 1, frame, 3, 64)}
    held = [*cache.caches, *cache.blocks]
    assert {(x.dtype, x.device) for x in held} == {(torch.bfloat16, META)}
    assert cache.nowhere.device == cache.rows.device == META
    assert cache.nowhere.dtype == torch.int32


def test_token_caches_keep_a_block_where_its_slot_says_and_the_text_in_front() -> None:
    profile = profile_of()
    seen: list[tuple[Tensor, ...]] = []

    def attend(*given: Tensor) -> Tensor:
        seen.append(given)
        return given[0] + 1

    kernels = dataclasses.replace(plain(), attend_tokens=attend)
    cache = Tokens(profile, kernels, torch.float32, CPU)
    assert not any(x.any() for x in (*cache.caches, *cache.blocks))
    frame, (q, _) = profile.frame_tokens, drawn(profile.frame_tokens, profile, 9)
    length = torch.tensor([6], dtype=torch.int32)
    for number in range(2):
        k, v = drawn(frame, profile, number)
        assert torch.equal(cache.attend(number, q, k, v, length), q + 1)
        given = seen[-1]
        assert given[0] is q and given[1] is k and given[2] is v and given[5] is length
        assert given[3].data_ptr() == cache.caches[number][0].data_ptr()
        assert given[4].data_ptr() == cache.caches[number][1].data_ptr()
        assert torch.equal(cache.blocks[number], torch.stack([k, v]))
    text = drawn(5, profile, 5)
    cache.write_text(1, *text)
    cache.commit(1, torch.tensor([8], dtype=torch.int32))
    wanted = torch.zeros_like(cache.caches[1])
    wanted[:, :, :5], wanted[:, :, 8 : 8 + frame] = torch.stack(text), cache.blocks[1]
    assert torch.equal(cache.caches[1], wanted) and not cache.caches[0].any()
    for slot in (-1, 0):
        cache.commit(0, torch.tensor([slot], dtype=torch.int32))
        first = profile.cache_tokens if slot < 0 else 0
        assert torch.equal(cache.caches[0][:, :, first : first + frame], cache.blocks[0])
        assert cache.caches[0].any(-1).any(-1).sum() == 2 * frame * (2 + slot)
    cache.clear()
    assert not any(x.any() for x in (*cache.caches, *cache.blocks))


def scales_of(profile: Profile, seed: int) -> hopper_fp8.Scales:
    rng, (heads, dim) = np.random.default_rng(seed), (profile.model.heads, profile.head_dim)
    of_head = [rng.uniform(0.005, 0.01, heads).astype(np.float32) for _ in range(2)]
    of_channel = rng.uniform(0.005, 0.01, (heads, dim)).astype(np.float32)
    mean = rng.standard_normal((heads, dim)).astype(np.float32) / 4
    return hopper_fp8.Scales(*of_head, mean, of_channel)


def test_tile_caches_hold_the_layouts_bytes() -> None:
    profile = profile_of()
    scales = [scales_of(profile, layer) for layer in range(2)]
    cache = Tiles(profile, plain(), scales, CPU)
    frame, heads, dim = profile.frame_tokens, 3, 64
    shapes = [hopper_fp8.image_shape(heads, n, dim) for n in (Ring.of(profile).tokens, frame)]
    for held, shape in zip((cache.caches, cache.blocks), shapes, strict=True):
        assert {(x.shape, x.dtype) for x in held} == {((2, *shape), torch.uint8)}
        assert len(held) == 2 and not any(x.any() for x in held)
    q, k, v = (drawn(frame, profile, 1)[0], *drawn(frame, profile, 2))
    text = drawn(5, profile, 3)
    cache.write_text(1, *text)
    length = torch.tensor([5], dtype=torch.int32)
    attended = cache.attend(1, q, k, v, length)
    arrays = [x[0].numpy() for x in (k, v)]
    block = hopper_fp8.pack(*arrays, scales[1])
    for found, wanted in zip(cache.blocks[1], block, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)
    caches = [np.zeros(shapes[0], np.uint8) for _ in range(2)]
    text_block = hopper_fp8.pack(*(x[0].numpy() for x in text), scales[1])
    hopper_fp8.commit(*text_block, 5, 0, *caches)
    for found, wanted in zip(cache.caches[1], caches, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)
    exact = nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, torch.cat([text[0], k], 1), torch.cat([text[1], v], 1)))
    ).transpose(1, 2)
    assert attended.shape == q.shape and attended.dtype == q.dtype
    assert float((attended - exact).square().mean() / exact.square().mean()) < 0.02
    cache.commit(1, torch.tensor([7], dtype=torch.int32))
    hopper_fp8.commit(*block, frame, 7, *caches)
    before = [x.clone() for x in cache.caches[1]]
    cache.commit(1, torch.tensor([-1], dtype=torch.int32))
    for found, kept, wanted in zip(cache.caches[1], before, caches, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)
        assert torch.equal(found, kept)
    assert not cache.caches[0].any()
    cache.clear()
    assert not any(x.any() for x in (*cache.caches, *cache.blocks))


def test_tile_caches_and_scales_lie_on_their_device() -> None:
    profile = profile_of()
    cache = Tiles(profile, plain(), [scales_of(profile, 0)] * 2, META)
    held = [*cache.caches, *cache.blocks, cache.front]
    held += [x for s in cache.scales for x in (s.q, s.k, s.k_mean, s.v)]
    assert {x.device for x in held} == {META}


def test_scales_go_to_the_device_and_back() -> None:
    scales = scales_of(profile_of(), 0)
    there = AttentionScales.of(scales, CPU)
    assert (there.q.shape, there.k.shape, there.k_mean.shape, there.v.shape) == (
        (3,), (3,), (3, 64), (3, 64),
    )  # fmt: skip
    back = there.numpy()
    for name in ("q_scale", "k_scale", "k_mean", "v_scale"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scales, name))
    wide = hopper_fp8.Scales(*(np.asfortranarray(x, np.float64) for x in vars_of(scales)))
    packed = AttentionScales.of(wide, CPU)
    assert packed.v.dtype == torch.float32 and packed.v.is_contiguous()


def vars_of(scales: hopper_fp8.Scales) -> list[np.ndarray]:
    return [scales.q_scale, scales.k_scale, scales.k_mean, scales.v_scale]


# --- the kernels of a GPU ---


def test_on_a_gpu_every_operation_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = recorded(monkeypatch, cuda_op, "pack_into", None)
    attended = recorded(monkeypatch, cuda_op, "attend_into", None)
    kernels = on_gpu()
    for name in ("modulated", "gated", "heads", "activated", "quantised", "product"):
        assert getattr(kernels, name) is getattr(fused_triton, name)
        assert getattr(plain(), name) is getattr(fused, name)
    assert kernels.attend_tokens is triton_op.attended
    assert kernels.commit_tiles is cuda_op.commit_into
    scales = AttentionScales(*(torch.tensor([float(i)]) for i in range(4)))
    k, v, k_block, v_block, k_cache, v_cache, length = (torch.tensor([i]) for i in range(7))
    kernels.pack(k, v, scales, k_block, v_block)
    assert_same(
        packed[0], k=k, v=v, k_scale=scales.k, k_mean=scales.k_mean, v_scale=scales.v,
        k_block=k_block, v_block=v_block,
    )  # fmt: skip
    q = torch.zeros(1, 3, 2, 4, dtype=torch.bfloat16)
    out = kernels.attend_tiles(q, k_block, v_block, k_cache, v_cache, length, scales)
    assert out.shape == q.shape and out.dtype == q.dtype and out is not q
    assert_same(
        attended[0], q=q, k_block=k_block, v_block=v_block, k_cache=k_cache, v_cache=v_cache,
        cache_len=length, q_scale=scales.q, k_scale=scales.k, v_scale=scales.v, out=out,
    )  # fmt: skip


def assert_same(found: dict[str, Any], **wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if found[name] is not value] == []


def test_the_plain_form_attends_to_what_is_valid_alone() -> None:
    profile = profile_of()
    (q, _), (k, v), cache = (drawn(6, profile, i) for i in range(3))
    caches = [x.clone() for x in cache]
    for x in caches:
        x[:, 4:] = float("nan")
    out = plain().attend_tokens(q, k, v, *caches, torch.tensor([4], dtype=torch.int32))
    both = (torch.cat([x[:, :4], own], 1) for x, own in zip(cache, (k, v), strict=True))
    exact = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *both)))
    assert torch.allclose(out, exact.transpose(1, 2), atol=1e-5) and out.is_contiguous()


@pytest.mark.parametrize("slot", [0, 3])
def test_the_plain_form_commits_tiles_at_their_slot(slot: int) -> None:
    profile, tokens = profile_of(), 70
    scales, (k, v) = scales_of(profile, 0), drawn(70, profile, 1)
    block = [torch.zeros(hopper_fp8.image_shape(3, tokens, 64), dtype=torch.uint8) for _ in "kv"]
    caches = [torch.zeros(hopper_fp8.image_shape(3, 140, 64), dtype=torch.uint8) for _ in "kv"]
    kernels = plain()
    kernels.pack(k, v, AttentionScales.of(scales, CPU), *block)
    kernels.commit_tiles(*block, torch.tensor([slot]), *caches, tokens)
    wanted = [np.zeros(hopper_fp8.image_shape(3, 140, 64), np.uint8) for _ in "kv"]
    hopper_fp8.commit(*hopper_fp8.pack(k[0].numpy(), v[0].numpy(), scales), tokens, slot, *wanted)
    for found, own in zip(caches, wanted, strict=True):
        np.testing.assert_array_equal(found.numpy(), own)
