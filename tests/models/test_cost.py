"""The plan against arithmetic by hand, and against networks that really run."""

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch

from aapt_deploy.errors import ProfileError, VerdictError
from aapt_deploy.models import cost
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.models.cost import LiveBytes
from aapt_deploy.profiles import (
    Precision,
    Profile,
    Sampler,
    Text,
    load,
    preset_folder,
)
from tests.support.commands import Ran

H100 = load("aapt-8b-736x416-h100")
PRESETS = sorted(path.stem for path in preset_folder().glob("*.toml"))
FP8, BF16 = "fp8_e4m3", "bf16"


@pytest.fixture(scope="module")
def planned() -> cost.Cost:
    return cost.cost_of(H100)


def stage(planned: cost.Cost, name: str) -> cost.StageCost:
    return next(s for s in planned.stages if s.name == name)


def test_the_generators_operations_by_hand(planned: cost.Cost) -> None:
    """Per token and layer 12 dim^2 weights at two operations each, and attention.

    Attention is two products with each of S cached keys and the block's own.
    """
    tokens, dim, depth = 46 * 26, 3072, 36
    generator = stage(planned, "generator")
    assert generator.products_gflop == pytest.approx(
        2 * 12 * dim**2 * depth * tokens / 1e9, rel=0.01
    )
    keys = 256 + 31 * tokens + tokens
    assert generator.attention_gflop == pytest.approx(
        4 * tokens * keys * dim * depth / 1e9, rel=1e-6
    )
    assert generator.floor_ms == pytest.approx(
        (generator.products_gflop + generator.attention_gflop) / 1979, rel=1e-3
    )
    assert generator.bound == "compute"


def test_weights_and_cache_by_hand(planned: cost.Cost) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Generator(H100).parameters())
    assert stage(planned, "generator").weights_gb + stage(
        planned, "prompt"
    ).weights_gb == pytest.approx(parameters / 1e9, abs=0.002)
    tiles = -(-(256 + 31 * 1196) // 64)
    assert planned.cache_gb == pytest.approx(2 * 36 * tiles * 64 * 3072 / 1e9, abs=0.001)
    assert planned.total_gb == pytest.approx(sum(planned.memory_gb.values()), abs=0.01)
    assert planned.fits and planned.total_gb < 60


def test_a_prompt_is_bound_by_reading_its_weights(planned: cost.Cost) -> None:
    prompt = stage(planned, "prompt")
    assert prompt.bound == "memory" and prompt.floor_ms == pytest.approx(
        prompt.weights_gb / 3350 * 1000, rel=1e-2
    )


def test_a_cache_of_wider_numbers_needs_more(planned: cost.Cost) -> None:
    wide = H100.replace(precision=Precision("bf16", "fp8_e4m3", "bf16"))
    assert cost.cost_of(wide).cache_gb == pytest.approx(2 * planned.cache_gb, rel=0.01)


def test_a_cpu_has_no_floor_and_no_limit(tiny: Profile) -> None:
    planned = cost.cost_of(tiny)
    assert planned.floor_ms is None and planned.fits and planned.memory_gb["workspace"] == 0
    assert all(s.floor_ms is None and s.bound == "" for s in planned.stages)


def test_live_bytes_follow_what_is_freed_and_leave_out_what_was_given() -> None:
    weight = torch.zeros(1000)
    with LiveBytes([weight]) as live:
        view = weight.view(10, 100)
        a = view + 1  # 4000 bytes
        b = a * 2  # 8000
        del a
        c = b.t() + 1  # 8000 again: the view is nobody's memory
        del b, c
        d = torch.zeros(10)
    assert live.most == 8000
    assert live.live == 40 and len(d) == 10


def test_activations_are_those_of_a_real_run() -> None:
    """The decoder's peak on the meta device is the peak of the same module on real tensors."""
    from aapt_deploy.models.aapt.graphs import graph_modules
    from aapt_deploy.models.aapt.signature import decoder
    from aapt_deploy.models.aapt.vae import Vae
    from aapt_deploy.models.inputs import random_inputs

    demo = load("demo-cpu")
    signature = decoder(demo)
    module = graph_modules(demo, Generator(demo), Vae(demo))["decoder"]
    inputs = random_inputs(
        [(s.name, s.shape, s.dtype) for s in (*signature.inputs, *signature.state)], 0, 0
    )
    with torch.no_grad(), LiveBytes([*inputs, *module.state_dict().values()]) as live:
        module(*inputs)
    assert live.most > 10e6
    assert stage(cost.cost_of(demo), "decoder").activations_gb == pytest.approx(
        live.most / 1e9, abs=0.0006
    )


def test_the_command_prints_a_plan_on_any_machine(aapt: Callable[..., Ran]) -> None:
    ran = aapt("plan", "aapt-8b-736x416-h100", "--json")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["fits"] and record["limit_gb"] == 80 and 10 < record["floor_ms"] < 30
    assert "fits" in ran.err and "nothing was measured" in ran.err


def test_a_plan_that_does_not_fit_is_exit_3(aapt: Callable[..., Ran], tmp_path: object) -> None:
    path = f"{tmp_path}/small.toml"
    with open(path, "w") as file:
        file.write(H100.dumps().replace("memory_gb = 80", "memory_gb = 16"))
    ran = aapt("plan", path)
    assert ran.code == VerdictError.exit_code and "DOES NOT FIT" in ran.err and ran.out == ""


def test_an_unknown_preset_is_named(aapt: Callable[..., Ran]) -> None:
    ran = aapt("plan", "aapt-80b")
    assert ran.code == ProfileError.exit_code and "'aapt-80b'" in ran.error


# --- a profile that memory bounds ---


@pytest.fixture(scope="module")
def small_picture() -> Profile:
    """The H100's model over pictures of 128x64.

    A block has 32 tokens, far fewer than its rates need.
    """
    return H100.replace(video=dataclasses.replace(H100.video, width=128, height=64))


def test_a_generator_that_memory_bounds_reads_its_weights_and_its_cache(
    small_picture: Profile,
) -> None:
    planned = cost.cost_of(small_picture)
    generator = stage(planned, "generator")
    bandwidth = cost.GPUS["H100"].bandwidth / 1e12  # GB a millisecond
    assert planned.cache_gb / generator.weights_gb > 0.01
    assert generator.bound == "memory"
    read = generator.weights_gb + planned.cache_gb
    assert generator.floor_ms == pytest.approx(read / bandwidth, rel=2e-3)
    without = generator.weights_gb / bandwidth
    assert generator.floor_ms - without > 0.01 * without


def test_the_decoder_reads_its_weights_alone_in_the_compute_precision(
    small_picture: Profile,
) -> None:
    decoder = stage(cost.cost_of(small_picture), "decoder")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Vae(small_picture).decoder.parameters())
    assert decoder.weights_gb == pytest.approx(2 * parameters / 1e9, abs=0.0006)
    assert decoder.floor_ms is not None
    reading = 2 * parameters / cost.GPUS["H100"].bandwidth * 1000
    multiplying = decoder.products_gflop / 989
    assert decoder.floor_ms == pytest.approx(max(reading, multiplying), abs=0.006)


def test_the_floor_of_a_step_is_all_passes_and_one_decoding() -> None:
    twice = H100.replace(sampler=Sampler((1.0, 0.5, 0.25)))
    planned = cost.cost_of(twice)
    generator, decoder = (stage(planned, name).floor_ms for name in ("generator", "decoder"))
    assert generator is not None and decoder is not None
    assert planned.passes == 3
    assert planned.floor_ms == pytest.approx(3 * generator + decoder, abs=0.006)
    assert planned.floors_ms == {
        "step": planned.floor_ms,
        "generator": round(3 * generator, 3),
        "decoder": decoder,
    }


def test_what_is_resident_by_hand(planned: cost.Cost) -> None:
    by_name = {s.name: s for s in planned.stages}
    memory = planned.memory_gb
    state = sum(math.prod(spec.shape) for spec in signatures(H100)["decoder"].state)
    assert memory["decoder memory"] == pytest.approx(
        2 * 2 * state / 1e9, abs=0.0006
    )  # bf16, before and after
    working = by_name["generator"].activations_gb + by_name["decoder"].activations_gb
    assert memory["activations"] == pytest.approx(working, abs=0.001)
    assert memory["weights"] == pytest.approx(sum(s.weights_gb for s in planned.stages), abs=0.001)
    assert memory["kv cache"] == planned.cache_gb
    assert (memory["workspace"], memory["runtime"]) == (2.0, 1.0)


def test_a_generator_without_text_reads_no_prompt(tiny: Profile) -> None:
    mute = tiny.replace(text=Text("vocabulary", 0, 16))
    planned = cost.cost_of(mute)
    assert [s.name for s in planned.stages] == ["encoder", "generator", "decoder"]
    assert planned.floors_ms == {}


@pytest.mark.parametrize(("limit", "fits"), [(0, True), (9, False), (10, True), (11, True)])
def test_a_plan_fits_up_to_its_limit(planned: cost.Cost, limit: int, fits: bool) -> None:
    full = dataclasses.replace(planned, memory_gb={"weights": 7.5, "runtime": 2.5}, limit_gb=limit)
    assert full.total_gb == 10.0 and full.fits is fits
    assert json.loads(full.json())["fits"] is fits


def test_tiles_of_an_fp8_cache_are_whole(tiny: Profile) -> None:
    """Bytes of whole tiles of 64 keys; any other cache has no such tiles."""
    eight = H100.replace(precision=Precision("bf16", "fp8_e4m3", "fp8_e4m3"))
    assert cost._cache_bytes(eight) == -(-H100.cache_tokens // 64) * 64 * 2 * 36 * 3072
    wide = H100.replace(precision=Precision("bf16", "fp8_e4m3", "bf16"))
    assert cost._cache_bytes(wide) == 2 * 2 * 36 * 3072 * H100.cache_tokens


# --- the GPUs ---


@pytest.mark.parametrize("name", [name for name in PRESETS if load(name).target.device == "cuda"])
def test_a_preset_for_a_gpu_fits_it_with_all_that_is_resident(name: str) -> None:
    profile = load(name)
    planned = cost.cost_of(profile)
    assert profile.target.name in cost.GPUS and planned.fits and planned.limit_gb
    memory = planned.memory_gb
    assert (memory["workspace"], memory["runtime"]) == (cost.WORKSPACE_GB, cost.RUNTIME_GB)


@pytest.mark.parametrize("name", [name for name in PRESETS if "-rtx" in name])
def test_a_preset_for_rtx_says_what_the_plan_says(name: str) -> None:
    """Memory, floor, and LATE if no engine can be in time; most reach 60 to 75 % of the peak."""
    text, planned = (preset_folder() / f"{name}.toml").read_text(), cost.cost_of(load(name))
    assert f" {planned.total_gb:.2f} GB of {planned.limit_gb}. Floor of a step" in text
    assert planned.floor_ms is not None
    assert f" {planned.floor_ms:.1f} ms of {planned.budget_ms} ms" in text
    assert ("LATE" in text) == (planned.floor_ms > 0.75 * planned.budget_ms)


def test_what_the_presets_say_of_wider_caches_and_longer_windows() -> None:
    """The RTX 5090 needs FP8 caches, and the RTX 4090 those and a shorter window."""
    small, large = load("aapt-8b-736x416-rtx-4090"), load("aapt-8b-736x416-rtx-5090")
    wide = Precision(BF16, FP8, BF16)
    assert not cost.cost_of(large.replace(precision=wide)).fits
    assert not cost.cost_of(small.replace(precision=wide)).fits
    assert not cost.cost_of(small.replace(window=large.window)).fits


@pytest.mark.parametrize(
    ("name", "sms", "gigahertz", "per_clock", "bus_bits", "gigabits"),
    [
        ("RTX 4060", 24, 2.46, 512, 128, 17),
        ("RTX 4090", 128, 2.52, 512, 384, 21),
        ("RTX 5090", 170, 2.407, 512, 512, 28),
        ("RTX PRO 6000", 188, 2.617, 1024, 512, 28),
    ],
)
def test_rates_are_those_of_the_cards_units(
    name: str, sms: int, gigahertz: float, per_clock: int, bus_bits: int, gigabits: int
) -> None:
    """Operations of a multiprocessor a clock, in bf16 with FP32 sums: a GeForce has half.

    FP8 has twice as many. FP32 runs on 128 cores, two operations each. Bandwidth is bus times pin.
    """
    flops, bandwidth, _, _ = cost.GPUS[name]
    clocks = sms * gigahertz * 1e9
    assert flops[BF16] == pytest.approx(clocks * per_clock, rel=2e-3)
    assert flops[FP8] == pytest.approx(2 * clocks * per_clock, rel=2e-3)
    assert flops["fp32"] == pytest.approx(clocks * 256, rel=2e-3)
    assert bandwidth == pytest.approx(bus_bits / 8 * gigabits * 1e9, rel=1e-3)
