"""FP8: scales that rollouts gave, graphs that round where they say, and engines that run them."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from aapt_deploy.backends import build
from aapt_deploy.backends.torch_eager import round_products
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.backends.trt import lower_attention
from aapt_deploy.bundle import scales
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import LinearScales, Scales
from aapt_deploy.errors import InputError, ProfileError, UsageError
from aapt_deploy.export import calibrate, export, parity
from aapt_deploy.models import checkpoint, fp8
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import graph_modules
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import Ring, hopper_fp8
from aapt_deploy.profiles import Fp8, Profile, Text, loads
from tests.support.commands import Ran
from tests.support.opening import silent
from tests.support.tiny import Exported, make_checkpoint

# Three blocks: only the middle one is quantised.
KEPT = ("text_in", "time_*", "*.first.*", "*.last.*")
QUANTISED = {
    f"{stream}.1.{name}" for stream in ("text", "visual") for name in ("qkv", "out", "w1", "w2")
}


# --- rules ---


def test_rules_name_layers_by_path_and_by_place(three: Checkpoint) -> None:
    found = {layer.path: layer.kept_by for layer in fp8.layers(three.generator, KEPT)}
    assert {path for path, rule in found.items() if not rule} == QUANTISED
    for layer in fp8.layers(three.generator, KEPT):
        assert layer.linear is three.generator.get_submodule(layer.path)
    assert (
        found["time_in.0"] == "time_*"
        and found["visual.0.qkv"] == "*.first.*"
        and found["text.2.qkv"] == "*.last.*"
    )
    assert {
        layer.path for layer in fp8.layers(three.generator, ["visual.1.w*"]) if layer.kept_by
    } == {"visual.1.w1", "visual.1.w2"}


def test_rules_that_keep_everything_are_refused(tmp_path: Path, tiny: Profile) -> None:
    """Both blocks of the tiny profile are at an end."""
    drawn = make_checkpoint(tmp_path / "c.safetensors", tiny)
    with pytest.raises(ProfileError, match=r"\[fp8\] keep = .* leaves no linear layer of 2 blocks"):
        calibrate.calibrate(drawn, silent)


def test_the_section_is_optional_and_checked(tiny: Profile) -> None:
    text = tiny.dumps()
    without = text[: text.index("[fp8]")]
    assert loads(without, "x").fp8 == Fp8(KEPT)
    assert loads(without + '[fp8]\nkeep = ["a", "b"]\nmargin = 1.5\n', "x").fp8 == Fp8(
        ("a", "b"), 1.5
    )
    for bad, words in (
        ("margin = 0.9", "margin = 0.9 is below 1"),
        ("keep = [1]", "must be a list of str"),
        ("margin = nan", "below 1"),
    ):
        with pytest.raises(ProfileError, match=words):
            loads(without + f"[fp8]\n{bad}\n", "x")


# --- calibration ---


def test_scales_are_the_largest_magnitudes_of_the_rollouts(
    three: Checkpoint, calibrated: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by hooks of our own, on the same rollouts."""
    ours = checkpoint.load(three.path)
    inputs: dict[str, float] = {}
    largest_q = torch.zeros(3, 2)

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, x: inputs.update(
            {path: max(inputs.get(path, 0.0), float(x[0].abs().max()))}
        )

    attend = Generator._run

    def run(self: Generator, x: Any, t: Any, rope: Any, inner: Any) -> Any:
        def watch(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            largest_q[layer] = torch.maximum(largest_q[layer], q.abs().amax((0, 1, 3)))
            return inner(layer, q, k, v)

        return attend(self, x, t, rope, watch)

    monkeypatch.setattr(Generator, "_run", run)
    for path in QUANTISED:
        ours.generator.get_submodule(path).register_forward_pre_hook(note(path))
    passes = calibrate._rollouts(ours, 0, silent)
    assert set(calibrated.linear) == QUANTISED
    for path, own in calibrated.linear.items():
        weight = three.generator.get_parameter(f"{path}.weight").detach().abs().amax(1)
        wanted = np.append(weight.numpy() / 448, inputs[path] * 1.1 / 448)
        found = np.append(own.weight_scale, own.input_scale)
        assert np.array_equal(found, found.astype(ml_dtypes.bfloat16)), path
        assert ((found >= wanted * (1 - 1e-6)) & (found < wanted * (1 + 2**-7))).all(), path
    for layer, own_attention in enumerate(calibrated.attention):
        np.testing.assert_allclose(
            own_attention.q_scale * 448, largest_q[layer].numpy() * 1.1, rtol=1e-5
        )
        assert not own_attention.k_mean.any()
    calibration = json.loads(calibrated.metadata["calibration"])
    profile = three.profile
    assert (
        calibration["passes"]
        == passes
        == 2 * len(profile.sampler.timesteps) * (profile.window.frames + 1 + calibrate.SPARE_BLOCKS)
    )
    assert calibrated.checkpoint_sha256 == three.sha256


def test_keys_and_values_of_the_text_are_in_the_range(three: Checkpoint) -> None:
    ranges = calibrate.AttentionRanges(three.profile)
    shape = (1, 4, three.profile.model.heads, three.profile.head_dim)
    q, k, v = (torch.zeros(shape) for _ in range(3))
    caches = [torch.zeros(1, 16, *shape[2:]) for _ in range(2)]
    caches[0][0, 3, 1, 5], caches[1][0, 2, 0, 7], caches[0][0, 4:] = (
        3.0,
        -2.0,
        100.0,
    )  # behind the text: not the op's own
    with ranges:
        torch.ops.aapt.block_causal_attention(
            q, k, v, *caches, torch.tensor([4], dtype=torch.int32)
        )
    assert (
        ranges.largest[1, 0, 1, 5] == 3
        and ranges.largest[2, 0, 0, 7] == 2
        and ranges.largest.sum() == 5
    )


def test_the_same_seed_gives_the_same_scales(
    three: Checkpoint, calibrated: Scales, tmp_path: Path
) -> None:
    scales.save(calibrated, tmp_path / "a")
    scales.save(calibrate.calibrate(checkpoint.load(three.path), silent), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("pictures", [0, 2])
@pytest.mark.parametrize("text", [Text("vocabulary", 4, 16), Text("embedding", 3, 16)], ids=str)
def test_rollouts_begin_with_the_checkpoints_pictures_and_only_words_are_its_own(
    loaded: Checkpoint, text: Text, pictures: int
) -> None:
    """There is no text encoder, so embeddings are drawn; so is a picture if there is none."""
    frames = dict(list(loaded.start_frames.items())[:pictures])
    profile = loaded.profile.replace(text=text)
    checkpoint_ = dataclasses.replace(loaded, profile=profile, start_frames=frames)
    starts, again, others = (calibrate._starts(checkpoint_, seed) for seed in (0, 0, 1))
    assert len(starts) == max(1, pictures)
    for start, frame in zip(starts, frames.values(), strict=False):
        np.testing.assert_array_equal(start.image, frame.image.numpy())
    shape = {"vocabulary": (1, 4), "embedding": (1, 3, 16)}[text.kind]
    for one, two, other in zip(starts, again, others, strict=True):
        assert one.image.shape == (profile.video.height, profile.video.width, 3)
        assert one.text is not None and two.text is not None and other.text is not None
        assert one.text.shape == shape and one.prompt == ""
        assert np.array_equal(one.image, two.image) and np.array_equal(one.text, two.text)
        own = pictures and text.kind == "vocabulary"
        assert bool(own) == np.array_equal(one.text, other.text)
        assert bool(pictures) == np.array_equal(one.image, other.image)
    if pictures and text.kind == "vocabulary":
        words = [family_of(profile).text_of(profile, frame.prompt) for frame in frames.values()]
        assert all(np.array_equal(a.text, b) for a, b in zip(starts, words, strict=True))


# --- arithmetic ---


def test_rounding_is_that_of_the_other_facets(three: Checkpoint, calibrated: Scales) -> None:
    """Codes and products agree in torch's e4m3, the cache's encoder and modelopt."""
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=rng) * 10**s for s in (-4, -2, 0, 2, 4)])
    codes = fp8.encode(x, torch.tensor(0.5)).view(torch.uint8).numpy()
    assert np.array_equal(codes, hopper_fp8.encode((x / 0.5).numpy()))
    path = "visual.1.w1"
    own = calibrated.linear[path]
    plain = three.generator.get_submodule(path)
    assert isinstance(plain, nn.Linear)
    layer = fp8.Linear8(fp8.encode_weight(plain.weight.detach(), own), plain.bias, own)
    sample = torch.randn(2, 30, plain.in_features, generator=rng) * float(own.input_scale[0]) * 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.tensor_quant import scaled_e4m3
    expected = nn.functional.linear(
        scaled_e4m3(sample, torch.tensor(float(own.input_scale[0]) * 448), None, 4, 3),
        scaled_e4m3(
            plain.weight.detach(), torch.tensor(own.weight_scale)[:, None] * 448, None, 4, 3
        ),
        plain.bias,
    )
    with torch.no_grad():
        found = layer(sample)
        loss = (found - plain(sample)).square().mean() / plain(sample).square().mean()
        # modelopt multiplies by a reciprocal, so a quotient between two codes may go either way.
        assert (found - expected).square().mean() < 5e-3 * (found - plain(sample)).square().mean()
    assert 1e-4 < float(loss.sqrt()) < 0.06


def test_products_in_bf16_read_multiply_and_give_bf16() -> None:
    torch.manual_seed(0)
    linear, x = nn.Sequential(nn.Linear(64, 48), nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 64)
    weight, bias = linear[0].state_dict().values()
    expected = (x.bfloat16() @ weight.bfloat16().T).float() + bias
    before = linear[0](x)
    round_products(linear)
    found = linear[0](x)
    assert torch.equal(found, found.bfloat16().float()) and torch.equal(
        linear[1](found), linear[1](found).bfloat16().float()
    )
    loss, difference = (
        float((y - found).detach().square().mean().sqrt()) for y in (before, expected)
    )
    assert difference < 2**-8 * float(found.detach().abs().max()) and loss > 1e-4


# --- the file ---


def test_a_scales_file_returns_as_it_was(
    calibrated: Scales, three: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / scales.FILE
    scales.save(calibrated, path)
    again = scales.load(path, three.profile)
    assert again.linear.keys() == calibrated.linear.keys() and again.metadata == calibrated.metadata
    pairs = [(again.linear[path], own) for path, own in calibrated.linear.items()]
    for a, b in [*pairs, *zip(again.attention, calibrated.attention, strict=True)]:
        assert all(np.array_equal(vars(a)[key], vars(b)[key]) for key in vars(b))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("attention.01.k_scale"), "attention.01.k_scale is missing"),
        (
            lambda t: t.update({"attention.01.k_scale": np.zeros(2, np.float32)}),
            "not finite and positive",
        ),
        (
            lambda t: t.update({"linear.visual.1.w1.input_scale": np.array([np.nan], np.float32)}),
            "not finite and positive",
        ),
        (
            lambda t: t.update({"attention.00.v_scale": np.ones((2, 9), np.float32)}),
            r"attention.00.v_scale is float32 \[2, 9\]",
        ),
        (lambda t: t.update({"linear.visual.1.w1.weight_scale": np.ones(512)}), "is float64"),
        (lambda t: t.update({"surplus": np.ones(1, np.float32)}), "1 surplus tensors: surplus"),
    ],
)
def test_damaged_scales_are_refused(
    calibrated: Scales,
    three: Checkpoint,
    tmp_path: Path,
    change: Callable[[Any], object],
    words: str,
) -> None:
    path = tmp_path / scales.FILE
    scales.save(calibrated, path)
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=words) as caught:
        scales.load(path, three.profile)
    assert caught.value.exit_code == 4 and caught.value.hint


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_what_is_no_scales_file_is_refused(
    three: Checkpoint, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "s").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        scales.load(tmp_path / "s", three.profile)
    with pytest.raises(InputError, match="is not of format aapt-scales-1"):
        scales.load(three.path, three.profile)


def test_scales_of_another_generator_are_refused(
    three: Checkpoint, calibrated: Scales, tmp_path: Path
) -> None:
    for path, words in (("visual.9.w1", "has not"), ("visual.1.qkv", "5 weight scales")):
        alien = Scales(
            calibrated.linear
            | {path: LinearScales(np.ones(1, np.float32), np.ones(5, np.float32))},
            calibrated.attention,
        )
        with pytest.raises(InputError, match=words):
            export.export_bundle(three, tmp_path / "bundle", False, silent, alien)
    assert list(tmp_path.iterdir()) == []


# --- graphs ---


def test_graphs_agree_as_a_whole_and_product_by_product(exported: Exported) -> None:
    assert [row for row in exported.rows if not row.ok] == []
    products = {row.graph: row for row in exported.rows if "FP8 products" in row.case}
    assert {graph: row.case for graph, row in products.items()} == {
        "prompt": "4 FP8 products",
        "generator": "4 FP8 products",
    }
    assert max(row.relative for row in products.values()) < parity.FP32_TOLERANCE / 20


def test_weights_are_stored_in_fp8_and_quantised_once(
    exported: Exported, three: Checkpoint, calibrated: Scales
) -> None:
    for name, stream in (("generator", "visual"), ("prompt", "text")):
        graph = onnx.load(exported.path / f"{name}.onnx").graph
        onnx.checker.check_model(exported.path / f"{name}.onnx")
        kinds = {t.name: t for t in graph.initializer}
        stored = {n for n, t in kinds.items() if t.data_type == TensorProto.FLOAT8E4M3FN and t.dims}
        assert stored == {
            f"generator.{path}.weight" for path in QUANTISED if path.startswith(stream)
        }
        assert all(
            node.input[0] not in stored for node in graph.node if node.op_type == "QuantizeLinear"
        )
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4
        for path in (p for p in QUANTISED if p.startswith(stream)):
            weight = three.generator.get_parameter(f"{path}.weight").detach().numpy()
            codes = np.frombuffer(kinds[f"generator.{path}.weight"].raw_data, np.uint8).reshape(
                weight.shape
            )
            assert np.array_equal(
                codes, hopper_fp8.encode(weight / calibrated.linear[path].weight_scale[:, None])
            )


def test_the_plugin_takes_the_scales_of_the_bundle(exported: Exported) -> None:
    opened = Bundle.open(exported.path)
    opened.verify()
    found = scales.load(opened.checked(scales.FILE), opened.profile)
    model = lower_attention.lower_for_plugin(
        onnx.load(exported.path / "generator.onnx"), Ring.of(opened.profile), found.attention
    )
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.array_equal(constants["aapt.v_scale.2"], found.attention[2].v_scale)
    assert opened.manifest["precision"] == "fp8"


@pytest.mark.parametrize("what", ["weight", "input_scale", "nothing"])
def test_one_wrong_code_or_scale_is_found(
    exported: Exported, three: Checkpoint, calibrated: Scales, tmp_path: Path, what: str
) -> None:
    """Change one bit, or a scale by a hundredth: too little for the whole graph."""
    graph = onnx.load(exported.path / "generator.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name == f"generator.visual.1.w1.{what}" == "generator.visual.1.w1.weight":
            codes = bytearray(tensor.raw_data)
            codes[77] ^= 0x40  # of the exponent
            tensor.raw_data = bytes(codes)
        elif tensor.name == f"generator.visual.1.w1.{what}":
            tensor.CopyFrom(
                numpy_helper.from_array(
                    numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name
                )
            )
    onnx.save(graph, tmp_path / "generator.onnx")
    own = checkpoint.load(three.path)
    fp8.apply(own.generator, calibrated)
    module = graph_modules(own.profile, own.generator, own.vae)["generator"]
    row = parity.check_products(
        tmp_path / "generator.onnx", module, signatures(own.profile)["generator"], own.profile
    )
    assert row.ok == (what == "nothing"), row


def test_coverage_is_counted_from_the_shapes(three: Checkpoint, calibrated: Scales) -> None:
    rows = {row.graph: row for row in export.coverage(three.profile, calibrated)}
    profile = three.profile
    t, d = profile.frame_tokens, profile.model.dim
    eight = 2 * t * 12 * d * d / 1e9
    assert rows["generator"].fp8 * rows["generator"].gflop == pytest.approx(eight)
    attention = 4 * 3 * t * (profile.cache_tokens + t) * d / 1e9
    assert rows["generator"].rest["attention, FP8 where its caches are"] * rows[
        "generator"
    ].gflop == pytest.approx(attention)
    assert all(row.fp8 + sum(row.rest.values()) == pytest.approx(1) for row in rows.values())
    assert rows["generator"].rest["kept by rule *.first.*"] == pytest.approx(rows["generator"].fp8)
    assert rows["decoder"].fp8 == rows["encoder"].fp8 == 0
    assert export.coverage(profile, None) == []


def test_a_generator_too_large_to_check_is_checked_in_part(
    three: Checkpoint, calibrated: Scales, tmp_path: Path
) -> None:
    """The first and last block make a small generator with their weights and scales."""
    last = {
        path.replace(".1.", ".2."): own
        for path, own in calibrated.linear.items()
        if path.startswith("visual")
    }
    both = Scales(calibrated.linear | last, calibrated.attention, calibrated.metadata)
    weights = export.Weights(checkpoint.stored(three.path), both, {1: 2})
    assert torch.equal(
        weights.tensor("generator.visual.1.out.bias"), three.generator.visual[2].out.bias
    )
    rows = export._check_reduced(tmp_path, "generator", three.profile, weights)
    assert [row.case for row in rows][-1] == "4 FP8 products, 2 of 3 blocks" and all(
        row.ok for row in rows
    )
    assert list(tmp_path.iterdir()) == []


# --- engines ---


@pytest.mark.usefixtures("one_core")
def test_an_fp8_bundle_is_built_compared_and_measured(
    exported: Exported, aapt: Callable[..., Ran], tmp_path: Path
) -> None:
    opened = Bundle.open(Path(shutil.copytree(exported.path, tmp_path / "bundle")))
    (built,) = build.build_engine(opened, "onnxruntime", None, BuildOptions(silent))
    assert built.key == "onnxruntime-fp8" and built.psnr_db is not None and 20 < built.psnr_db < 90
    for precision in ("fp32", "int8"):
        with pytest.raises(
            UsageError,
            match=f"holds graphs in fp8; onnxruntime builds fp8 from them, not {precision}",
        ):
            build.build_engine(opened, "onnxruntime", precision, BuildOptions(silent))
    (half,) = build.build_engine(opened, "torch", "bf16", BuildOptions(silent))
    assert (
        half.key == "torch-bf16" and half.psnr_db is not None and built.psnr_db < half.psnr_db < 90
    )
    ran = aapt("quality", opened.path, "--precision", "fp8", "--seconds", 1, "--json")
    record = json.loads(ran.out)
    assert (record["candidate"], record["reference"]) == (
        "onnxruntime-fp8",
        "torch-bf16",
    ) and 1e-4 < np.mean(record["latent_error"]) < 0.1, ran.err


# --- the command ---


def test_the_command_takes_scales_again(
    aapt: Callable[..., Ran], exported: Exported, three: Checkpoint, tmp_path: Path
) -> None:
    ran = aapt(
        "export",
        three.path,
        "-o",
        tmp_path / "again",
        "--precision",
        "fp8",
        "--scales",
        exported.path / scales.FILE,
        "--json",
    )
    assert ran.code == 0, ran.err
    for name in ("generator.onnx", "prompt.onnx", scales.FILE):
        assert (tmp_path / "again" / name).read_bytes() == (exported.path / name).read_bytes()
    assert "of 0.0" in ran.err and "GFLOP in FP8; not:" in ran.err
    assert json.loads(ran.out)["coverage"][2]["graph"] == "generator"


def test_a_bundle_in_the_way_is_told_before_calibrating(
    aapt: Callable[..., Ran], exported: Exported, three: Checkpoint
) -> None:
    ran = aapt("export", three.path, "-o", exported.path, "--precision", "fp8")
    assert ran.code == 6 and "exists" in ran.error and "calibrating" not in ran.err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--precision", "int8"), 2, "cannot be exported in 'int8'"),
        (("--scales", "x"), 2, "--scales x is for fp8 graphs"),
        (("--precision", "fp8", "--scales", "gone"), 4, "scales gone cannot be read"),
    ],
)
def test_wrong_options_are_named(
    aapt: Callable[..., Ran],
    loaded: Checkpoint,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    ran = aapt("export", loaded.path, "-o", tmp_path / "b", *options)
    assert ran.code == code and words in ran.error
    assert list(tmp_path.iterdir()) == []
