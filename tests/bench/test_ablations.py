"""bench/ablations.py on postage stamps.

Without recycling a generator is blind to what it should not see. The whole comparison runs and
resumes.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.train.judge import evaluate
from tests.support import ROOT

BENCH = ROOT / "bench" / "ablations.py"


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH.parent), *sys.path])
    import ablations as module

    return module


def test_unrecycled_sees_the_first_frame_and_then_none(
    ablations: ModuleType, loaded: Checkpoint
) -> None:
    """Its own past still reaches it: through the cache."""
    profile, rng = loaded.profile, torch.Generator().manual_seed(0)
    generator = ablations.generator_of(loaded.path, ablations.Variant(recycles=False)).eval()
    text, size = (
        profile.text.tokens,
        (1, profile.video.latent_channels, profile.latent_height, profile.latent_width),
    )
    heads = (profile.model.heads, profile.head_dim)
    noisy, condition = torch.randn(size, generator=rng), torch.randn(1, 6, *size[2:], generator=rng)
    rope = torch.from_numpy(temporal_rope(profile, 3))[None]

    def step(previous: torch.Tensor, past: torch.Tensor, length: int) -> torch.Tensor:
        caches = [
            [past.expand(1, text + 2 * profile.frame_tokens, *heads)] * profile.model.depth
        ] * 2
        with torch.no_grad():
            clean: torch.Tensor = generator.step(
                noisy,
                previous,
                condition,
                torch.ones(1),
                rope,
                *caches,
                torch.tensor([length], dtype=torch.int32),
            )[0]
        return clean

    one, other, past = (
        torch.randn(size, generator=rng),
        torch.randn(size, generator=rng),
        torch.randn(1, 1, *heads, generator=rng),
    )
    later = text + profile.frame_tokens
    assert not torch.equal(step(one, past, text), step(other, past, text))
    assert torch.equal(step(one, past, later), step(other, past, later))
    assert not torch.equal(step(one, past, later), step(one, 2 * past, later))


def test_all_variants_are_trained_once_and_judged(
    ablations: ModuleType,
    loaded: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "TEACHING_WORLDS", 6)
    kept = {
        "causal-clip": ablations.VARIANTS["causal-clip"],
        "unrecycled": ablations.VARIANTS["unrecycled"],
    }
    monkeypatch.setattr(ablations, "VARIANTS", kept)
    profile, rng = loaded.profile, torch.Generator().manual_seed(0)
    shape = (profile.latent_height, profile.latent_width)
    latents, out, record = (
        tmp_path / "latents.safetensors",
        tmp_path / "out",
        tmp_path / "record.json",
    )
    save_file({
        "z": torch.randn(5, 8, profile.video.latent_channels, *shape, generator=rng).half(),
        "conditions": torch.randn(5, 7, 6, *shape, generator=rng).half(),
        "tokens": torch.zeros(5, profile.text.tokens, dtype=torch.int64),
        "key": torch.zeros(32, dtype=torch.uint8),
    }, latents)  # fmt: skip

    def run(*more: str) -> None:
        fixed = [
            "--from",
            loaded.path,
            "--distilled",
            loaded.path,
            "--updates",
            2,
            "--head-start",
            1,
            "--regression",
            2,
            "--record",
            record,
        ]
        monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, [latents, out, *fixed]), *more])
        ablations.main()

    run("--variants", "unrecycled", "--train-only")
    assert (
        not record.exists()
        and (out / "unrecycled.safetensors").exists()
        and not (out / "causal-clip.safetensors").exists()
    )
    before = (out / "unrecycled.safetensors").stat().st_mtime_ns
    run("--flights", "1", "--seconds", "5")
    assert (out / "unrecycled.safetensors").stat().st_mtime_ns == before  # not trained again
    written = json.loads(record.read_text())
    assert list(written["evaluation"]["made"]) == ["distilled", "causal-clip", "unrecycled"]
    assert len({each["checkpoint"] for each in written["evaluation"]["made"].values()}) == 3
    made = written["variants"]
    assert (
        made["causal-clip"]["stage"]["logits"] == "clip"
        and made["unrecycled"]["variant"]["recycles"] is False
    )
    assert (
        made["unrecycled"]["regression_updates"] == 2
        and made["causal-clip"]["regression_updates"] == 0
    )
    with pytest.raises(SystemExit, match=r"unrecycled in .* was made, or begun, otherwise"):
        run("--variants", "unrecycled", "--train-only", "--updates", "3")
    assert written["curves"].keys() >= {"causal-clip-played", "unrecycled-taught"}
    assert json.loads(capsys.readouterr().out).keys() == written["evaluation"]["made"].keys()
