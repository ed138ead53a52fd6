"""Profiles: every shipped preset loads, round-trips and builds.

Everything that is wrong in a file is named, with its value, at once.
"""

import dataclasses
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from aapt_deploy.backends.trt.flavour import RTX
from aapt_deploy.errors import ProfileError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import (
    LARGEST,
    Profile,
    Sampler,
    Text,
    Vae,
    Video,
    Window,
    load,
    loads,
    preset_folder,
)

PRESETS = sorted(path.stem for path in preset_folder().glob("*.toml"))
TINY = load("tiny-cpu")
TINY_TOML = (preset_folder() / "tiny-cpu.toml").read_text()


def refusal(text: str) -> str:
    with pytest.raises(ProfileError) as caught:
        loads(text, "given.toml")
    assert caught.value.exit_code == 4
    assert caught.value.hint
    return str(caught.value)


def edited(**lines: str) -> str:
    """Return the tiny preset with the line of each key replaced.

    An empty replacement removes it. `section__key` names a key.
    """
    section, out = "", []
    for line in TINY_TOML.splitlines():
        if match := re.match(r"\[(\w+)\]", line):
            section = match[1]
        key = line.split(" = ")[0]
        out.append(lines.pop(f"{section}__{key}" if section else key, line))
    assert not lines, f"the preset has no {sorted(lines)}"
    return "\n".join(out)


# --- the shipped presets ---


def test_the_presets_named_in_the_documents_ship() -> None:
    assert {"demo-cpu", "tiny-cpu", "demo-rtx", "aapt-8b-736x416-h100"} <= set(PRESETS)
    assert {"aapt-8b-1280x720-h100", "aapt-8b-736x416-rtx-5090"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_and_round_trips(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    assert loads(profile.dumps(), "copy") == profile
    assert load(str(preset_folder() / f"{name}.toml")) == profile


@pytest.mark.parametrize("name", [name for name in PRESETS if "-rtx" in name])
def test_a_preset_for_rtx_is_another_s_on_another_gpu(name: str) -> None:
    """Only the window of the RTX 4090 is shorter, because the card holds no more."""
    model = name.split("-rtx")[0]
    made, of = load(name), load("demo-cpu" if model == "demo" else f"{model}-h100")
    window = Window(12) if name.endswith("-4090") else of.window
    same = replace(of, name=name, target=made.target, precision=made.precision, window=window)
    assert made == same and made.target.device == "cuda" and made.target.sm in RTX.sms
    assert made.precision == of.precision or model == "demo"


def test_strings_and_numbers_survive_dumps() -> None:
    odd = replace(
        TINY,
        name='a "quoted"\\name\n\x7f é',
        sampler=Sampler((1.0, 1 / 3, 1e-9)),
        target=replace(TINY.target, name="\\"),
    )
    assert loads(odd.dumps(), "copy") == odd


def test_a_profile_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TINY.model.dim = 64  # type: ignore[misc]


def test_reading_a_profile_imports_nothing_heavy() -> None:
    code = (
        "import sys, aapt_deploy.profiles; "
        "print(sorted({'numpy', 'torch', 'onnx', 'av'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# --- derived figures ---


def test_derived_figures_of_the_8b_presets() -> None:
    small, large = load("aapt-8b-736x416-h100"), load("aapt-8b-1280x720-h100")
    assert (small.frame_tokens, small.cache_tokens) == (
        1196,
        37332,
    )  # 46 x 26 tokens; 256 text + 31 blocks
    assert (large.frame_tokens, large.cache_tokens) == (3600, 57856)
    assert (small.head_dim, small.latent_width, small.latent_height) == (128, 92, 52)
    assert small.kv_cache_bytes == 2 * 36 * 37332 * 3072
    assert small.step_budget_ms == pytest.approx(166.667, abs=1e-3)


def test_derived_figures_follow_their_sources() -> None:
    assert (TINY.frame_tokens, TINY.cache_tokens) == (8, 4 + 4 * 8)
    assert replace(TINY, window=Window(5, 0), text=Text("vocabulary", 0, 16)).cache_tokens == 5 * 8
    assert TINY.kv_cache_bytes == 4 * 2 * 2 * 36 * 32
    assert (
        replace(TINY, precision=replace(TINY.precision, kv_cache="bf16")).kv_cache_bytes
        == TINY.kv_cache_bytes // 2
    )
    assert replace(TINY, video=replace(TINY.video, fps=30)).step_budget_ms == pytest.approx(
        4000 / 30
    )


# --- what is refused ---


def test_unknown_missing_and_mistyped_keys_are_listed_together() -> None:
    wrong = {
        "model__dim": "dim = 32.5",
        "model__heads": "",
        "video__fps": 'fps = "24"',
        "window__frames": "frames = true",
    }
    message = refusal(
        edited(**wrong, sampler__timesteps='timesteps = [1.0, "x"]')
        + "\nzoom = 2\n[extra]\nkey = 1\n"
    )
    for part in (
        "given.toml",
        "'model.dim' = 32.5 must be int",
        "missing key 'model.heads'",
        "'video.fps' = '24' must be int",
        "'window.frames' = True must be int",
        "'sampler.timesteps' = [1.0, 'x'] must be a list of float",
        "unknown key 'target.zoom'",
        "unknown key 'extra'",
    ):
        assert part in message


def test_an_unknown_key_is_answered_with_the_known_ones() -> None:
    message = refusal(edited(window__frames="frame = 3"))
    assert "unknown key 'window.frame' (known: frames, sink_frames, sink_follows" in message
    assert "missing key 'window.frames'" in message


@pytest.mark.parametrize(
    "section", ["model", "text", "video", "window", "sampler", "vae", "precision", "target"]
)
def test_a_missing_section_is_named(section: str) -> None:
    assert f"missing section '{section}'" in refusal(
        re.sub(rf"\[{section}\]\n(?:.+\n)+", "", TINY_TOML)
    )


def test_a_section_must_be_a_section_and_a_name_a_string() -> None:
    assert "'name' = 7 must be str" in refusal(edited(name="name = 7"))
    assert "missing key 'name'" in refusal(edited(name=""))
    assert "'window' must be a section [window]" in refusal(
        "window = 3\n" + re.sub(r"\[window\]\nframes = 3\n", "", TINY_TOML)
    )


@pytest.mark.parametrize(
    "text",
    [
        "name =",
        "\x00",
        "[model",
        "x = " + "[" * 20000,
        'name = "a"\nname = "b"',
        "x = " + "9" * 5000,
    ],
)
def test_what_is_not_toml_is_refused(text: str) -> None:
    assert "not valid TOML" in refusal(text)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"model__heads": "heads = 5"}, "model.dim = 32 is not a multiple of model.heads = 5"),
        ({"model__heads": "heads = 8"}, "= 4 is not 8 or a larger"),
        ({"model__heads": "heads = 0"}, "model.heads = 0 is below 1"),
        ({"model__depth": "depth = -1"}, "model.depth = -1 is below 1"),
        ({"text__tokens": "tokens = -4"}, "text.tokens = -4 is below 0"),
        ({"text__kind": 'kind = "poem"'}, "text.kind = 'poem'"),
        (
            {"video__width": "width = 72"},
            "video 72x32 is not a multiple of spatial_stride x patch = 16",
        ),
        ({"video__height": "height = 24"}, "video 64x24"),
        ({"video__fps": "fps = 24\nspatial_stride = 6"}, "video strides 6 / 4"),
        ({"video__fps": "fps = 24\nspatial_stride = 1"}, "video strides 1 / 4"),
        ({"video__fps": "fps = 24\ntemporal_stride = 8"}, "video strides 8 / 8"),
        (
            {"window__frames": "frames = 3\nsink_frames = 0\nsink_follows = true"},
            "window.sink_follows is set, and window.sink_frames = 0",
        ),
        (
            {"sampler__timesteps": "timesteps = [1.0]\nfirst_block = [0.5]"},
            "sampler.first_block = [0.5] must start at 1.0",
        ),
        ({"sampler__timesteps": 'timesteps = [1.0]\nkind = "x"'}, "sampler.kind = 'x'"),
        ({"text__tokens": "tokens = 4\nreplay = true"}, "text.replay is set, and sampler.write"),
        ({"text__tokens": 'tokens = 4\nattention = "x"'}, "text.attention = 'x'"),
        ({"window__frames": "frames = 0"}, "window.frames = 0 is below 1"),
        ({"sampler__timesteps": "timesteps = []"}, "sampler.timesteps = []"),
        ({"sampler__timesteps": "timesteps = [0.9, 0.5]"}, "sampler.timesteps = [0.9, 0.5]"),
        ({"sampler__timesteps": "timesteps = [1.0, 1.0]"}, "sampler.timesteps = [1.0, 1.0]"),
        ({"sampler__timesteps": "timesteps = [1.0, 0.0]"}, "sampler.timesteps = [1.0, 0.0]"),
        (
            {"sampler__timesteps": "timesteps = [1.0, nan, 0.5]"},
            "sampler.timesteps = [1.0, nan, 0.5]",
        ),
        (
            {"sampler__timesteps": "timesteps = [1.0]\ntemperature = 1.5"},
            "sampler.temperature = 1.5",
        ),
        (
            {"sampler__timesteps": "timesteps = [1.0]\ntemperature = nan"},
            "sampler.temperature = nan",
        ),
        (
            {"vae__decoder_channels": "decoder_channels = []"},
            "vae.decoder_channels = [] has 0 scales, 3 or 4 fit a stride of 8",
        ),
        (
            {"vae__encoder_channels": "encoder_channels = [8, 8]"},
            "vae.encoder_channels = [8, 8] has 2 scales",
        ),
        (
            {"vae__decoder_channels": "decoder_channels = [16, -8, 8]"},
            "vae.decoder_channels = -8 is below 1",
        ),
        ({"vae__temporal_kernel": "temporal_kernel = 0"}, "vae.temporal_kernel = 0 is below 1"),
        (
            {"vae__temporal_kernel": 'temporal_kernel = 3\nlook_back = "none"'},
            "vae.look_back = 'none' is not one of first, all",
        ),
        (
            {"precision__weights": 'weights = "fp7"'},
            "precision.weights = 'fp7' is not one of fp32, bf16, fp8_e4m3, int8",
        ),
        ({"target__device": 'device = "tpu"'}, "target.device = 'tpu'"),
        ({"target__device": 'device = "cpu"\nmemory_gb = -1'}, "target.memory_gb = -1 is below 0"),
        (
            {"video__width": "width = 1_000_000_000_000"},
            "video.width = 1000000000000 is above 16384",
        ),
        (
            {"window__frames": "frames = 100_000_000_000_000_000_000"},
            "window.frames = 100000000000000000000 is above 10000",
        ),
        (
            {"vae__decoder_channels": "decoder_channels = [16, 8, 70000]"},
            "vae.decoder_channels = 70000 is above 16384",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_values(lines: dict[str, str], reason: str) -> None:
    message = refusal(edited(**lines))
    assert "profile tiny-cpu" in message
    assert reason in message


def test_every_size_has_a_limit_below_which_all_counts_fit_into_64_bits() -> None:
    """At all limits at once; the presets are checked against theirs when they are loaded."""
    sections = {}
    for name in ("model", "text", "video", "window", "vae", "target"):
        section = getattr(TINY, name)
        fields = {
            key: value
            for key, value in vars(section).items()
            if key not in ("sink_frames", "temporal_stride", "spatial_stride")
        }
        most = {
            key: LARGEST[key] for key, value in fields.items() if type(value) is int
        }  # KeyError: a new field needs its limit
        most |= {
            key: (LARGEST[key],) * len(value)
            for key, value in fields.items()
            if isinstance(value, tuple)
        }
        sections[name] = replace(section, **most)
    sections["window"] = replace(sections["window"], sink_frames=LARGEST["sink_frames"])
    large = TINY.replace(**sections)
    assert large.model.dim == 1 << 16
    assert large.kv_cache_bytes < 2**63


def test_all_contradictions_are_listed_together() -> None:
    message = refusal(
        edited(
            model__heads="heads = 5",
            sampler__timesteps="timesteps = [0.5]",
            target__device='device = "tpu"',
        )
    )
    assert all(part in message for part in ("model.heads = 5", "timesteps = [0.5]", "'tpu'"))


def test_replace_checks_again() -> None:
    assert TINY.replace(window=Window(7)).window.frames == 7
    with pytest.raises(ProfileError, match=r"window\.sink_follows is set"):
        TINY.replace(window=Window(7, 0, sink_follows=True))


def test_a_stride_of_two_needs_both_time_doublings() -> None:
    video = Video(64, 32, 24, 4, spatial_stride=2)
    assert TINY.replace(video=video, vae=Vae((), (8, 8), 1, 1)).latent_width == 32
    with pytest.raises(ProfileError, match="has 1 scales, 2 fit a stride of 2"):
        TINY.replace(video=video, vae=Vae((), (8,), 1, 1))


# --- where a profile comes from ---


def test_a_name_that_is_nothing_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(
        ProfileError, match="'no-such' is neither a file nor a shipped preset"
    ) as caught:
        load("no-such")
    assert all(name in caught.value.hint for name in PRESETS)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match=re.escape(str(path))):
        load(str(path))


def test_a_file_is_read_and_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY.dumps())
    assert isinstance(load(str(path)), Profile)
    path.write_text(edited(model__dim=""))
    with pytest.raises(ProfileError, match=re.escape(str(path))):
        load(str(path))


# --- several latent frames a block, and families ---


def blocks_of(frames: int, window: Window) -> Profile:
    return TINY.replace(video=replace(TINY.video, block_frames=frames), window=window)


def test_windows_are_whole_blocks_of_latent_frames() -> None:
    chunked = blocks_of(3, Window(18, sink_frames=3))
    assert (chunked.block_tokens, chunked.frames_per_block) == (3 * chunked.frame_tokens, 12)
    assert chunked.cache_tokens == chunked.text.tokens + 21 * chunked.frame_tokens
    assert chunked.step_budget_ms == pytest.approx(3 * TINY.step_budget_ms)
    ring = Ring.of(chunked)
    assert (ring.block_tokens, ring.sink_blocks, ring.window_blocks) == (chunked.block_tokens, 1, 6)
    assert ring.tokens == chunked.cache_tokens
    for window, problem in (
        (Window(17, sink_frames=3), "window.frames = 17 is not a multiple of video.block_frames"),
        (
            Window(18, sink_frames=1),
            "window.sink_frames = 1 is not a multiple of video.block_frames = 3",
        ),
    ):
        with pytest.raises(ProfileError, match=problem):
            blocks_of(3, window)


def test_keys_that_came_later_are_written_only_if_they_are_used() -> None:
    assert "family" not in TINY.dumps() and "block_frames" not in TINY.dumps()
    chunked = dataclasses.replace(blocks_of(3, Window(18, sink_frames=0)), family="other")
    assert 'family = "other"' in chunked.dumps() and "block_frames = 3" in chunked.dumps()
    assert loads(chunked.dumps(), "x") == chunked
    with pytest.raises(ProfileError, match="'family' = 3 must be str"):
        loads(TINY.dumps().replace("\n", "\nfamily = 3\n", 1), "x")


def test_what_a_family_does_not_know_is_refused() -> None:
    with pytest.raises(ProfileError, match="family 'other' does not exist") as caught:
        family_of(dataclasses.replace(TINY, family="other"))
    assert caught.value.hint == "families: aapt, wan"
    with pytest.raises(ProfileError, match="block_frames = 3"):
        family_of(TINY).signatures(blocks_of(3, Window(18, sink_frames=3)))
