"""The default fine-tuning task: text-to-SQL pairs, made on the fly from a seed.

The built-in model has read schemas, questions and facts (:mod:`rosa_ds.models.grammar`) but no query, so an
adapter has something to learn that the base cannot do: exact match of the base is 0 %.
"""

from __future__ import annotations

import random

from rosa_ds.data.lexicon import Table, draw_table

AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}
INSTRUCTION = "Answer with SQL."


def generate_pairs(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """``count`` conversations, each ``{"messages": [user, assistant]}``: the same for the same seed.

    Row *i* depends on ``(seed, i)`` alone, so a longer list begins with the shorter one.
    """
    forms = (_select_where, _aggregate, _count, _order)
    rows = []
    for index in range(count):
        rng = random.Random(f"sql-{seed}-{index}")
        table = draw_table(rng)
        question, query = rng.choice(forms)(rng, table)
        prompt = f"{INSTRUCTION}\ntable: {table.schema()}\nquestion: {question}"
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": query}]})
    return rows


def _select_where(rng: random.Random, table: Table) -> tuple[str, str]:
    wanted, known = rng.sample(table.columns, 2)
    value = table.value(rng, known)
    question = rng.choice(
        (
            f"What is the {wanted} of the {table.row} whose {known} is {value}?",
            f"Which {wanted} has the {table.row} with {known} {value}?",
            f"Tell me the {wanted} when the {known} is {value}.",
        )
    )
    return question, f"SELECT {wanted} FROM {table.name} WHERE {known} = {_quote(table, known, value)}"


def _aggregate(rng: random.Random, table: Table) -> tuple[str, str]:
    word = rng.choice(tuple(AGGREGATES))
    number = rng.choice(table.number_columns)
    known = rng.choice(table.texts)
    value = table.value(rng, known)
    question = rng.choice(
        (
            f"What is the {word} {number} of {table.name} whose {known} is {value}?",
            f"Give the {word} {number} when the {known} is {value}.",
        )
    )
    where = f"WHERE {known} = {_quote(table, known, value)}"
    return question, f"SELECT {AGGREGATES[word]}({number}) FROM {table.name} {where}"


def _count(rng: random.Random, table: Table) -> tuple[str, str]:
    number = rng.choice(table.number_columns)
    value = table.value(rng, number)
    word, sign = rng.choice((("above", ">"), ("below", "<")))
    question = f"How many {table.name} have a {number} {word} {value}?"
    return question, f"SELECT COUNT(*) FROM {table.name} WHERE {number} {sign} {value}"


def _order(rng: random.Random, table: Table) -> tuple[str, str]:
    wanted, number = rng.choice(table.texts), rng.choice(table.number_columns)
    word, direction = rng.choice((("highest", " DESC"), ("lowest", "")))
    question = f"Which {wanted} has the {word} {number}?"
    return question, f"SELECT {wanted} FROM {table.name} ORDER BY {number}{direction} LIMIT 1"


def _quote(table: Table, column: str, value: str) -> str:
    return value if column in table.numbers else f"'{value}'"
