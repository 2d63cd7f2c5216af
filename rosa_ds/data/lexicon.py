"""Words and table schemas that the built-in corpora are made of.

Both the corpus that the built-in model was pretrained on (:mod:`rosa_ds.models.grammar`) and the default
fine-tuning task (:mod:`rosa_ds.data.sql`) draw their tables from here, so that the fine-tuning task is new
in what it asks for and not in what it speaks about.
"""

from __future__ import annotations

import dataclasses
import random

# topic -> (table name, singular, text columns, number columns)
TOPICS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "music": ("singers", "singer", ("name", "country", "genre", "label"), ("age", "albums", "awards")),
    "sport": ("players", "player", ("name", "team", "position", "country"), ("goals", "age", "height")),
    "school": ("students", "student", ("name", "major", "city", "school"), ("grade", "age", "year")),
    "work": ("employees", "employee", ("name", "office", "role", "city"), ("salary", "age", "years")),
    "films": ("films", "film", ("title", "director", "genre", "studio"), ("year", "budget", "length")),
    "books": ("books", "book", ("title", "author", "genre", "language"), ("year", "pages", "price")),
    "ships": ("ships", "ship", ("name", "port", "type", "owner"), ("crew", "length", "speed")),
    "towns": ("towns", "town", ("name", "county", "mayor", "river"), ("area", "people", "height")),
    "shops": ("shops", "shop", ("name", "street", "owner", "city"), ("staff", "rent", "sales")),
    "trains": ("trains", "train", ("name", "route", "origin", "class"), ("speed", "seats", "price")),
    "plants": ("plants", "plant", ("name", "colour", "region", "family"), ("height", "price", "weeks")),
    "races": ("races", "race", ("name", "winner", "track", "country"), ("laps", "year", "length")),
}
_ONSETS = ("b", "br", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea")
_CODAS = ("", "", "l", "n", "r", "s", "t", "m", "nd", "rk")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table's name, what one of its rows is called, and its columns in order of definition."""

    name: str
    row: str
    columns: tuple[str, ...]
    numbers: frozenset[str]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(column for column in self.columns if column not in self.numbers)

    @property
    def number_columns(self) -> tuple[str, ...]:
        return tuple(column for column in self.columns if column in self.numbers)

    def schema(self) -> str:
        """One line that describes the table, e.g. ``singers (name text, age number)``."""
        kinds = (f"{column} {'number' if column in self.numbers else 'text'}" for column in self.columns)
        return f"{self.name} ({', '.join(kinds)})"

    def value(self, rng: random.Random, column: str) -> str:
        """A value that could stand in this column."""
        return str(rng.randint(2, 999)) if column in self.numbers else invent_word(rng)


def draw_table(rng: random.Random) -> Table:
    """A table with 2-4 columns: at least one text and one number column, in random order.

    Every third table has an invented name, so that names have to be copied and cannot be recalled.
    """
    name, row, texts, numbers = TOPICS[rng.choice(tuple(TOPICS))]
    chosen_texts = rng.sample(texts, rng.choice((1, 2, 2)))
    chosen_numbers = rng.sample(numbers, rng.choice((1, 1, 2)))
    if rng.random() < 0.33:
        row = invent_word(rng, capital=False)
        name = row + "s"
    columns = chosen_texts + chosen_numbers
    rng.shuffle(columns)
    return Table(name, row, tuple(columns), frozenset(chosen_numbers))


def invent_word(rng: random.Random, capital: bool = True) -> str:
    """A pronounceable word of one to three syllables that nothing can have memorised, e.g. ``Tralond``."""
    syllables = rng.choice((1, 2, 2, 3))
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
    return word.capitalize() if capital else word
