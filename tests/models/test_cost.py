"""The plan against arithmetic by hand, and against networks that really run."""

import json
from collections.abc import Callable

import pytest
import torch

from aapt_deploy.errors import ProfileError, VerdictError
from aapt_deploy.models import cost
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.cost import LiveBytes
from aapt_deploy.profiles import Precision, Profile, load
from tests.support.commands import Ran

H100 = load("aapt-8b-736x416-h100")


@pytest.fixture(scope="module")
def planned() -> cost.Plan:
    return cost.plan(H100)


def stage(planned: cost.Plan, name: str) -> cost.Stage:
    return next(s for s in planned.stages if s.name == name)


def test_the_generators_operations_by_hand(planned: cost.Plan) -> None:
    """Per token and layer, 12 dim^2 weights at two operations each, and two products per key.

    The keys are the S cached ones and the block's own.
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
    gflop = generator.products_gflop + generator.attention_gflop
    assert generator.floor_ms == pytest.approx(gflop / 1979, rel=1e-3)
    assert generator.bound == "compute"


def test_weights_and_cache_by_hand(planned: cost.Plan) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Generator(H100).parameters())
    weights_gb = stage(planned, "generator").weights_gb + stage(planned, "prompt").weights_gb
    assert weights_gb == pytest.approx(parameters / 1e9, abs=0.002)
    tiles = -(-(256 + 31 * 1196) // 64)
    assert planned.cache_gb == pytest.approx(2 * 36 * tiles * 64 * 3072 / 1e9, abs=0.001)
    assert planned.total_gb == pytest.approx(sum(planned.memory_gb.values()), abs=0.01)
    assert planned.fits and planned.total_gb < 60


def test_a_prompt_is_bound_by_reading_its_weights(planned: cost.Plan) -> None:
    prompt = stage(planned, "prompt")
    floor_ms = prompt.weights_gb / 3350 * 1000
    assert prompt.bound == "memory" and prompt.floor_ms == pytest.approx(floor_ms, rel=1e-2)


def test_a_cache_of_wider_numbers_needs_more(planned: cost.Plan) -> None:
    wide = H100.replace(precision=Precision("bf16", "fp8_e4m3", "bf16"))
    assert cost.plan(wide).cache_gb == pytest.approx(2 * planned.cache_gb, rel=0.01)


def test_a_cpu_has_no_floor_and_no_limit(tiny: Profile) -> None:
    planned = cost.plan(tiny)
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
    from aapt_deploy.models.aapt.graphs import graph_modules, random_inputs
    from aapt_deploy.models.aapt.signature import decoder
    from aapt_deploy.models.aapt.vae import Vae

    demo = load("demo-cpu")
    signature = decoder(demo)
    module = graph_modules(demo, Generator(demo), Vae(demo))["decoder"]
    specs = (*signature.inputs, *signature.state)
    inputs = random_inputs([(s.name, s.shape, s.dtype) for s in specs], 0, 0)
    with torch.no_grad(), LiveBytes([*inputs, *module.state_dict().values()]) as live:
        module(*inputs)
    assert live.most > 10e6
    assert stage(cost.plan(demo), "decoder").activations_gb == pytest.approx(
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
