"""Check that every look parses from its own text, and that errors name the nearest word."""

import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.errors import UsageError
from aapt_deploy.models.aapt import prompts
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.models.aapt.prompts import ATTRIBUTES, SYNONYMS, Look, parse, token_ids
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import all_starts, start, text_of
from aapt_deploy.video.pictures import write_image
from tests.support.tiny import make_checkpoint

CHOICES = [(None, *words) for words in ATTRIBUTES.values()]
LOOKS = [Look(*values) for values in itertools.product(*CHOICES)]
WORDS = [word for words in ATTRIBUTES.values() for word in words]


def test_every_look_round_trips() -> None:
    assert len(LOOKS) == 5 * 5 * 5 * 4
    assert all(parse(str(look)) == look for look in LOOKS)


def test_the_tokens_of_every_look_are_its_own() -> None:
    ids = np.concatenate([token_ids(look) for look in LOOKS])
    assert ids.dtype == np.int64
    assert ids.shape == (len(LOOKS), prompts.PROMPT_TOKENS)
    assert len({tuple(row) for row in ids.tolist()}) == len(LOOKS)
    columns = [set(column) for column in ids.T.tolist()]
    assert set.union(*columns) == set(
        range(prompts.VOCABULARY_SIZE)
    )  # no id is wasted, none outside the table
    assert sum(map(len, columns)) == prompts.VOCABULARY_SIZE  # and none means two things


@pytest.mark.parametrize(
    ("prompt", "look"),
    [
        ("a forest in autumn at dusk, foggy", Look("forest", "autumn", "dusk", "foggy")),
        (
            "Snowy MOUNTAINS under a clear sky; midnight!",
            Look("mountains", "winter", "night", "clear"),
        ),
        ("fog over the sea", Look("islands", weather="foggy")),
        ("foggy, misty fog", Look(weather="foggy")),
        ("", Look()),
        ("any", Look()),
        ("  \n\t. ", Look()),
    ],
)
def test_plain_english_is_read(prompt: str, look: Look) -> None:
    assert parse(prompt) == look


@pytest.mark.parametrize("word", SYNONYMS)
def test_a_synonym_means_what_it_stands_for(word: str) -> None:
    assert SYNONYMS[word] in WORDS
    assert parse(word) == parse(SYNONYMS[word]) != Look()


def test_words_have_one_meaning() -> None:
    every = [*WORDS, *SYNONYMS, *prompts.FILLERS]
    assert len(set(every)) == len(every)


MISSPELT = [
    ("autum", "autumn"), ("dessert", "desert"), ("fogy", "foggy"), ("sunrize", "sunrise"),
    ("ilands", "islands"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "nearest"), MISSPELT)
def test_a_misspelt_word_is_answered_with_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"'{word}' is outside the vocabulary") as caught:
        parse(f"a forest, {word}")
    assert caught.value.hint.startswith(f"did you mean '{nearest}'?")
    assert caught.value.exit_code == 2


def test_a_strange_word_is_answered_with_the_vocabulary() -> None:
    with pytest.raises(UsageError, match="'zxq'") as caught:
        parse("zxq")
    assert "did you mean" not in caught.value.hint
    assert all(word in caught.value.hint for word in WORDS)


TWICE = [
    ("forest desert", "place"), ("snow in summer", "season"), ("noon at night", "time"),
    ("clear and misty", "weather"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "attribute"), TWICE)
def test_two_values_of_one_attribute_are_refused(prompt: str, attribute: str) -> None:
    with pytest.raises(UsageError, match=f"two values of {attribute}") as caught:
        parse(prompt)
    assert caught.value.hint


# --- prompts that are vectors of an external encoder ---


@pytest.fixture
def embedded(tiny: Profile) -> Profile:
    return tiny.replace(text=dataclasses.replace(tiny.text, kind="embedding", tokens=4, dim=16))


def test_vectors_come_from_a_file_or_are_zeros(embedded: Profile, tmp_path: Path) -> None:
    given, file = np.random.default_rng(0).standard_normal((4, 16)), tmp_path / "prompt.npy"
    for array in (given, given[None].astype(np.float16)):
        np.save(file, array)
        found = text_of(embedded, str(file))
        assert found is not None and found.dtype == np.float32
        assert np.array_equal(found, array.astype(np.float32).reshape(1, 4, 16))
    assert not np.any(text_of(embedded, "")) and np.shape(text_of(embedded, "")) == (1, 4, 16)


NARROW, INTEGERS = np.zeros((4, 15), np.float32), np.zeros((4, 16), np.int64)


@pytest.mark.parametrize(
    "content", [None, b"", b"text", NARROW, INTEGERS, np.full((4, 16), np.nan)]
)
def test_a_file_without_such_vectors_is_refused(
    embedded: Profile, tmp_path: Path, content: object
) -> None:
    file = tmp_path / "prompt.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"prompt\.npy") as caught:
        text_of(embedded, str(file))
    assert "[4, 16]" in caught.value.hint


def test_a_large_file_of_another_shape_is_refused_by_its_header(
    embedded: Profile, tmp_path: Path
) -> None:
    """Its 64 MB are not read."""
    file = tmp_path / "prompt.npy"
    np.lib.format.open_memmap(file, "w+", np.float32, (1 << 20, 16))  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"it holds float32 \[1048576, 16\]"):
            text_of(embedded, str(file))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_pickle_is_not_read(embedded: Profile, tmp_path: Path) -> None:
    np.save(tmp_path / "prompt.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        text_of(embedded, str(tmp_path / "prompt.npy"))


def test_a_generator_with_vectors_runs_from_its_start_frames(
    embedded: Profile, tmp_path: Path
) -> None:
    """A frame's description is no file's name, and no word of it has to be known."""
    loaded = make_checkpoint(tmp_path / "c.safetensors", embedded)
    frames = tmp_path / "start"
    frames.mkdir()
    write_image(frames / "hall.png", loaded.start_frames["dunes"].image.numpy())
    bundle: Any = SimpleNamespace(
        profile=embedded,
        manifest={"start_frames": {"hall": "/etc/passwd"}},
        path=tmp_path,
        checked=lambda name: tmp_path / name,
    )
    begins = [start(bundle, None, None), *all_starts(bundle)]
    assert [np.shape(begin.text) for begin in begins] == [(1, 4, 16)] * 2
    engines = EagerEngines(loaded, 1, "fp32")
    steer = lambda block: Steering(CRUISE, begins[0].text)
    blocks = rollout(engines, embedded, begins[0].image, steer, 0)
    assert [len(frames) for frames in itertools.islice(blocks, 3)] == [1, 4, 4]
