"""Prompts: every look can be said and read back, and a word that cannot be read is answered with the nearest one that can."""

import itertools

import numpy as np
import pytest

from aapt_deploy.errors import UsageError
from aapt_deploy.prompts import ATTRIBUTES, FILLERS, PROMPT_TOKENS, SYNONYMS, VOCABULARY_SIZE, Look, parse, token_ids

LOOKS = [Look(*values) for values in itertools.product(*((None, *words) for words in ATTRIBUTES.values()))]
WORDS = [word for words in ATTRIBUTES.values() for word in words]


def test_every_look_round_trips() -> None:
    assert len(LOOKS) == 5 * 5 * 5 * 4
    assert all(parse(str(look)) == look for look in LOOKS)


def test_the_tokens_of_every_look_are_its_own() -> None:
    ids = np.concatenate([token_ids(look) for look in LOOKS])
    assert ids.dtype == np.int64
    assert ids.shape == (len(LOOKS), PROMPT_TOKENS)
    assert len({tuple(row) for row in ids.tolist()}) == len(LOOKS)
    columns = [set(column) for column in ids.T.tolist()]
    assert set.union(*columns) == set(range(VOCABULARY_SIZE))  # no id is wasted, none outside the table
    assert sum(map(len, columns)) == VOCABULARY_SIZE  # and none means two things


@pytest.mark.parametrize(
    ("prompt", "look"),
    [
        ("a forest in autumn at dusk, foggy", Look("forest", "autumn", "dusk", "foggy")),
        ("Snowy MOUNTAINS under a clear sky; midnight!", Look("mountains", "winter", "night", "clear")),
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
    every = [*WORDS, *SYNONYMS, *FILLERS]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("word", "nearest"), [("autum", "autumn"), ("dessert", "desert"), ("fogy", "foggy"), ("sunrize", "sunrise"), ("ilands", "islands")]
)
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


@pytest.mark.parametrize(
    ("prompt", "attribute"), [("forest desert", "place"), ("snow in summer", "season"), ("noon at night", "time"), ("clear and misty", "weather")]
)
def test_two_values_of_one_attribute_are_refused(prompt: str, attribute: str) -> None:
    with pytest.raises(UsageError, match=f"two values of {attribute}") as caught:
        parse(prompt)
    assert caught.value.hint
