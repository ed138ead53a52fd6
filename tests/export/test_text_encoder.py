"""Prompts into vectors: umT5 against the authors' own encoder, both layouts, the cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from aapt_deploy.errors import AaptError, CheckpointError, InputError, UsageError
from aapt_deploy.export import text_encoder
from aapt_deploy.export.text_encoder import Encoder, cleaned, encode
from tests.support import wan
from tests.support.commands import Ran

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "grey": 4, "cat": 5, "walks": 6, "&": 7}


def wan_folder(
    folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda weights: None
) -> Path:
    """The layout of Wan2.1's repository, with the fixture's encoder."""
    weights = load_file(wan.FOLDER / "weights-umt5-tiny.safetensors")
    change(weights)
    place = folder / "google" / "umt5-xxl"
    place.mkdir(parents=True)
    torch.save(weights, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    tokenizer.save(str(place / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wan_folder(tmp_path / "wan")


def hugging_face(published: Path, folder: Path) -> Path:
    """The same encoder as transformers saves it."""
    weights, tokenizer = text_encoder.find(published)
    Encoder(weights, tokenizer, torch.float32).model.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("layout", ["wan", "hugging face"])
def test_vectors_are_the_authors_own(layout: str, folder: Path, tmp_path: Path) -> None:
    if layout == "hugging face":
        folder = hugging_face(folder, tmp_path / "hf")
    found = load_file(wan.FOLDER / "umt5-tiny.safetensors")
    ids = found["ids"][0][found["mask"][0].bool()].tolist()
    encoder = Encoder(*text_encoder.find(folder), torch.float32)
    vectors = encoder.embed(ids, 40)
    assert len(ids) < 40
    assert np.abs(vectors - found["embedding"][0].numpy()).max() < 1e-5
    assert not vectors[len(ids) :].any()


def test_prompts_end_with_the_end_token_and_are_cut_before_it(folder: Path) -> None:
    encoder = Encoder(*text_encoder.find(folder), torch.float32)
    assert encoder.ids("a grey cat", 8) == [3, 4, 5, 1]
    assert encoder.ids("a grey cat walks", 3) == [3, 4, 1]
    encoder.tokenizer.post_processor = processors.Sequence([])
    assert encoder.ids("a cat", 8) == [3, 5, 1]
    assert cleaned("  a &amp;amp; \n cat ") == "a & cat"


def test_the_cache_answers_for_prompts_that_were_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    first = encode(["a cat", "a grey cat"], folder, 8, "bf16", said.append)
    assert [np.load(file).shape for file in first] == [(8, 32), (8, 32)]
    assert not np.array_equal(np.load(first[0]), np.load(first[1]))
    loads = sum("loading" in text for text in said)
    monkeypatch.setattr(text_encoder, "Encoder", None)  # it must not be needed
    assert encode(["a  grey cat"], folder, 8, "bf16", said.append) == [first[1]]
    assert loads == sum("loading" in text for text in said) == 1
    monkeypatch.undo()


def test_another_encoder_has_other_files(folder: Path) -> None:
    before = encode(["a cat"], folder, 8, "fp32", quiet)[0]
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(path, weights_only=True)
    torch.save({name: 2 * value for name, value in weights.items()}, path)
    after = encode(["a cat"], folder, 8, "fp32", quiet)[0]
    assert before != after and not np.array_equal(np.load(before), np.load(after))
    assert encode(["a cat"], folder, 9, "fp32", quiet)[0] != after


def without_norm(weights: dict[str, Tensor]) -> None:
    del weights["norm.weight"]


def without_words(weights: dict[str, Tensor]) -> None:
    del weights["token_embedding.weight"]


@pytest.mark.parametrize(
    ("spoil", "kind", "problem"),
    [
        (lambda folder: (folder / "google/umt5-xxl/tokenizer.json").unlink(), InputError,
         "no tokenizer.json"),
        (lambda folder: (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink(), InputError,
         "no weights of an encoder"),
        (lambda folder: (folder / "google/umt5-xxl/tokenizer.json").write_text("{"), InputError,
         "cannot be read"),
        (lambda folder: (shutil.rmtree(folder), wan_folder(folder, without_norm)), CheckpointError,
         "it differs in norm.weight"),
        (lambda folder: (shutil.rmtree(folder), wan_folder(folder, without_words)),
         CheckpointError, "it lacks 'token_embedding.weight'"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_encoder_is_refused(
    spoil: Callable[[Path], object], kind: type[AaptError], problem: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(kind) as caught:
        encode(["a cat"], folder, 8, "fp32", quiet)
    assert problem in str(caught.value) and caught.value.hint
    assert not list(text_encoder.cache_folder().glob("*"))


def test_what_cannot_be_encoded_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        encode(["a cat", " "], folder, 8, "fp32", quiet)
    with pytest.raises(UsageError, match="precision 'fp7' does not exist"):
        encode(["a cat"], folder, 8, "fp7", quiet)


def test_the_commands(
    aapt: Callable[..., Ran], folder: Path, tmp_path: Path, wan_bundle: Path
) -> None:
    one = tmp_path / "p.npy"
    words = ("--encoder", folder, "--tokens", "16")
    assert aapt("prompt", "a cat", *words, "-o", one).code == 0
    assert np.load(one).shape == (16, 32)
    ran = aapt("prompt", "a cat", "grey", *words, "-o", tmp_path / "many", "--json")
    assert ran.code == 0, ran.err
    assert list(json.loads(ran.out).values()) == ["a cat", "grey"]
    assert np.array_equal(np.load(tmp_path / "many" / "00.npy"), np.load(one))
    films = []
    for prompt in (("--prompt", one), ("--prompt", "a cat", "--encoder", folder)):
        out = tmp_path / f"{len(films)}.y4m"
        ran = aapt("stream", wan_bundle, "-o", out, "--seconds", "0.5", *prompt)
        assert ran.code == 0, ran.err
        films.append(out.read_bytes())
    assert films[0] == films[1]
    ran = aapt("stream", wan_bundle, "-o", tmp_path / "x.y4m", "--encoder", folder)
    assert ran.code == 2 and "needs words" in ran.err
