"""Text in which something is hidden: sentences of essays, of a generator, or of one paragraph repeated."""

# ruff: noqa: SIM905 (lists of words would take a line a word)

import random
import re
from collections.abc import Iterator
from itertools import cycle

from lt_train.runtime.text_files import read_texts

ADJECTIVES = (
    "amber bitter brave calm careful clever crooked curious distant dusty eager early faded faithful fierce gentle golden grateful "
    "hidden hollow humble idle jagged kind lively lonely narrow nervous noble patient polished proud quiet restless rusty silent "
    "silver slender sturdy sudden tender weary"
).split()
NOUNS = (
    "anchor apple barrel basket blanket bridge candle castle clock compass cradle curtain drum engine feather fiddle garden hammer "
    "harbor island jacket kettle ladder lantern ledger letter market meadow mirror orchard paddle pebble pillow quilt ribbon river "
    "saddle shovel spindle teapot thimble tunnel violin wagon whistle window"
).split()
PEOPLE = "baker captain carpenter doctor farmer gardener judge librarian miller painter pilot poet sailor tailor teacher".split()
VERBS = (
    "admired borrowed broke carried cleaned described drew examined forgot found hid lost measured mended moved painted praised "
    "remembered repaired sold"
).split()
PLACES = (
    "after the storm|at dawn|behind the mill|before the fair|beside the lake|beyond the hills|by the old wall|in the cellar|"
    "near the station|on a cold morning|on the hill|outside the village|under the oak|while it rained"
).split("|")

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""The irrelevant text of the passkey task (arXiv 2305.16300)."""

SENTENCE = re.compile(r".+?(?:[.!?][\"')\]]*(?=\s)|$)")


def essay_sentences(folder: str) -> list[str]:
    """All sentences of the .txt files in a folder, in the order of the files' names, each on one line.

    Raises:
        UserError: see `read_texts`.
    """
    texts = read_texts(folder, "path").values()
    return [found.strip() for text in texts for found in SENTENCE.findall(" ".join(text.split()))]


def endless(sentences: list[str] | None, rng: random.Random) -> Iterator[str]:
    """The given sentences from a random one on, repeated; without any, generated ones."""
    if sentences is None:
        while True:
            yield made_sentence(rng)
    start = rng.randrange(len(sentences))
    yield from cycle(sentences[start:] + sentences[:start])


def made_sentence(rng: random.Random) -> str:
    person, noun, other = rng.choice(PEOPLE), rng.choice(NOUNS), rng.choice(NOUNS)
    adjective, verb, place = rng.choice(ADJECTIVES), rng.choice(VERBS), rng.choice(PLACES)
    return rng.choice(
        (
            f"The {adjective} {person} {verb} the {noun} {place}.",
            f"{place.capitalize()}, the {person} {verb} a {noun} and an old {other}.",
            f"Nobody knew why the {person} {verb} the {adjective} {noun}.",
        )
    )
