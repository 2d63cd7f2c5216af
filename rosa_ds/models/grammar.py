"""The corpus that the built-in model is pretrained on: schemas, facts and questions from a templated grammar.

It teaches what a language model needs before it can be fine-tuned: to read a table's schema, to find the
words of a question in it, to copy invented words that it has never seen, and to write capitals, quotes and signs.
It contains no query: words such as ``select`` occur only alone, to be written in capitals.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rosa_ds.data.lexicon import Table, draw_table

Pair = tuple[str, str]


def generate_conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """An endless stream of two-message conversations, the same for the same seed."""
    forms = (_facts, _find_parts, _find_parts, _compare, _columns, _notation)
    rng = random.Random(f"grammar-{seed}")
    while True:
        prompt, answer = rng.choice(forms)(rng, draw_table(rng))
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _facts(rng: random.Random, table: Table) -> Pair:
    """Rows of a table as text, and one value looked up by another."""
    key = rng.choice(table.texts)
    rows = [{column: table.value(rng, column) for column in table.columns} for _ in range(rng.choice((1, 2, 2)))]
    lines = ["; ".join(f"{column} is {row[column]}" for column in table.columns) for row in rows]
    row = rng.choice(rows)
    wanted = rng.choice([column for column in table.columns if column != key])
    question = rng.choice(
        (
            f"What is the {wanted} of the {table.row} whose {key} is {row[key]}?",
            f"Tell me the {wanted} when the {key} is {row[key]}.",
        )
    )
    return f"{table.name}: " + "\n".join(lines) + f"\nquestion: {question}", row[wanted]


def _find_parts(rng: random.Random, table: Table) -> Pair:
    """What a question over a schema speaks about: its table, its columns or its value."""
    wanted, known = rng.sample(table.columns, 2)
    value = table.value(rng, known)
    word = rng.choice(("", "", "average ", "highest ", "lowest ", "total "))
    question = rng.choice(
        (
            f"What is the {word}{wanted} of the {table.row} whose {known} is {value}?",
            f"Which {word}{wanted} has the {table.row} with {known} {value}?",
            f"Give the {word}{wanted} when the {known} is {value}.",
        )
    )
    task, answer = rng.choice(
        (
            ("Name the table of the question.", table.name),
            ("Name the column that is asked for.", wanted),
            ("Name the column that is known.", known),
            ("Name the value that is known.", value),
            ("Say what is asked and what is known.", f"{word}{wanted} in {table.name}, {known} is {value}"),
        )
    )
    return f"{task}\ntable: {table.schema()}\nquestion: {question}", answer


def _compare(rng: random.Random, table: Table) -> Pair:
    """Questions about amounts and order, as parts in words."""
    number, text = rng.choice(table.number_columns), rng.choice(table.texts)
    value = table.value(rng, number)
    above = rng.choice(("above", "below"))
    end = rng.choice(("highest", "lowest"))
    question, answer = rng.choice(
        (
            (
                f"How many {table.name} have a {number} {above} {value}?",
                f"count in {table.name}, {number} {above} {value}",
            ),
            (f"Which {text} has the {end} {number}?", f"{text} in {table.name}, {end} {number}"),
        )
    )
    return f"Say what is asked and what is known.\ntable: {table.schema()}\nquestion: {question}", answer


def _columns(rng: random.Random, table: Table) -> Pair:
    """Questions about the schema itself."""
    kind = rng.choice(("number", "text"))
    matching = table.number_columns if kind == "number" else table.texts
    task, answer = rng.choice(
        (
            (f"List the {kind} columns.", ", ".join(matching)),
            ("List the columns.", ", ".join(table.columns)),
            ("Name the table.", table.name),
        )
    )
    return f"{task}\ntable: {table.schema()}", answer


def _notation(rng: random.Random, table: Table) -> Pair:
    """Capitals, quotes, brackets and signs, each used by a rule that the task states."""
    column = rng.choice(table.columns)
    value = table.value(rng, column)
    words = f"{rng.choice(('the', 'each', 'no', 'from', 'where', 'order', 'count', 'limit', 'select'))} {table.row} {column}"
    sign = rng.choice("<>=")
    task, answer = rng.choice(
        (
            (f"Write in capitals: {words}", words.upper()),
            (f"Write in capitals: {value} {table.name}", f"{value} {table.name}".upper()),
            (f"Write in quotes: {value}", f"'{value}'"),
            (f"Write in brackets: {column}", f"({column})"),
            (f"Write with {sign}: {column} {value}", f"{column} {sign} {value}"),
            (f"Write the parts of {table.name} with *.", "*".join(table.columns)),
        )
    )
    return task, answer
