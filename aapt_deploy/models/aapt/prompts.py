"""Parse prompts of the demo world: a few words that choose its look.

A prompt is plain English over a small vocabulary: "a forest in autumn at dusk, foggy". Each
attribute takes one token, which is its "any" token if the prompt does not name it. A profile with
text.kind = "vocabulary" has no other text encoder.
"""

import difflib
import re
from dataclasses import dataclass

import numpy as np

from aapt_deploy.errors import UsageError

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "place": ("mountains", "desert", "islands", "forest"),
    "season": ("spring", "summer", "autumn", "winter"),
    "time": ("dawn", "noon", "dusk", "night"),
    "weather": ("clear", "cloudy", "foggy"),
}
SYNONYMS = {
    "mountain": "mountains", "dunes": "desert", "island": "islands", "sea": "islands",
    "ocean": "islands", "coast": "islands", "woods": "forest", "trees": "forest", "fall": "autumn",
    "snow": "winter", "snowy": "winter", "sunrise": "dawn", "morning": "dawn", "day": "noon",
    "midday": "noon", "sunset": "dusk", "evening": "dusk", "midnight": "night", "sunny": "clear",
    "clouds": "cloudy", "overcast": "cloudy", "fog": "foggy", "mist": "foggy", "misty": "foggy",
}  # fmt: skip
FILLERS = frozenset((
    "a", "an", "and", "at", "by", "during", "in", "of", "on", "over", "sky", "skies", "the",
    "under", "weather", "with",
))  # fmt: skip
# Each attribute has an "any" token of its own.
VOCABULARY_SIZE = sum(len(words) + 1 for words in ATTRIBUTES.values())
PROMPT_TOKENS = len(ATTRIBUTES)


@dataclass(frozen=True)
class Look:
    """The attributes of a prompt; None if it does not name one."""

    place: str | None = None
    season: str | None = None
    time: str | None = None
    weather: str | None = None

    def __str__(self) -> str:
        return ", ".join(word for word in vars(self).values() if word) or "any"


def parse(prompt: str) -> Look:
    """Parse a prompt.

    Raises UsageError if a word is not in the vocabulary, or two words set one attribute.
    """
    found: dict[str, str] = {}
    for word in re.findall(r"[^\s,.;:!?]+", prompt.lower()):
        value = SYNONYMS.get(word, word)
        attribute = next((name for name, words in ATTRIBUTES.items() if value in words), None)
        if attribute is None:
            if word in FILLERS or word == "any":
                continue
            known = [w for words in ATTRIBUTES.values() for w in words]
            near = difflib.get_close_matches(word, [*known, *SYNONYMS], n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            hint = f"{meant}known words: {', '.join(known)}"
            raise UsageError(f"prompt word {word!r} is outside the vocabulary", hint)
        if found.setdefault(attribute, value) != value:
            first = found[attribute]
            wrong = f"prompt names two values of {attribute}: {first!r} and {value!r}"
            raise UsageError(wrong, "name one of them")
    return Look(**found)


def token_ids(look: Look) -> np.ndarray:
    """Return int64 [1, PROMPT_TOKENS]: one id per attribute, in the order of ATTRIBUTES."""
    ids, first = [], 0
    for name, words in ATTRIBUTES.items():
        value = getattr(look, name)
        ids.append(first + (0 if value is None else 1 + words.index(value)))
        first += len(words) + 1
    return np.array([ids], np.int64)
