"""How good a prediction is: by question, and BLEU and chrF over all of them.

What is a library's is the library's: SQL is read by sqlglot, BLEU and chrF are sacrebleu's. Both are in the extra ``evaluation``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rosa_ds.evaluation.bootstrap import percentile_interval, resampled_rows
from rosa_ds.evaluation.numbers import answer_number


def exact_match(prediction: str, reference: str) -> bool:
    """Are both the same text?"""
    return prediction == reference


def answer_match(prediction: str, reference: str) -> bool:
    """Do both give the same number? GSM8K's, as :func:`rosa_ds.evaluation.numbers.answer_number` finds it.

    Raises: ValueError for a reference without a number.
    """
    expected = answer_number(reference)
    if expected is None:
        raise ValueError(
            f"answer_match compares numbers, and the reference {reference!r} has none: use exact_match, or other rows"
        )
    return answer_number(prediction) == expected


def sql_match(prediction: str, reference: str) -> bool:
    """Are both the same query, but for spaces, the case of names and keywords, kinds of quotes and a last semicolon?

    Texts that are no SQL are compared as they are, without regard to case and spaces.
    """
    return _normalised_sql(prediction) == _normalised_sql(reference)


@functools.lru_cache(maxsize=4096)
def _normalised_sql(text: str) -> str:
    sqlglot = _require("sqlglot", "sql_match")
    try:
        # MySQL's words: both kinds of quotes make a string, as in SQLite wherever no column is called like it
        statements = [statement for statement in sqlglot.parse(text, read="mysql") if statement is not None]
        for statement in statements:
            for name in statement.find_all(sqlglot.exp.Identifier):
                name.set("this", name.this.lower())
                name.set("quoted", False)
        return ";".join(statement.sql(dialect="mysql", comments=False) for statement in statements)
    except (sqlglot.errors.SqlglotError, RecursionError):  # the second for hundreds of brackets in each other
        return " ".join(text.lower().split()).rstrip("; ")


QUESTION_SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact_match": exact_match,
    "sql_match": sql_match,
    "answer_match": answer_match,
}
"""Each compares a prediction with one reference."""
CORPUS_SCORES = ("bleu", "chrf")
GENERATED = (*QUESTION_SCORES, *CORPUS_SCORES)
"""All metrics that look at what a model writes."""
CLASSIFIED = ("accuracy", "mcc", "f1")
"""All metrics of classifiers."""


def check_references(metrics: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError for references that a metric cannot be compared with, before anything is generated."""
    for reference in (one for allowed in references for one in allowed):
        for metric in metrics:
            if metric == "answer_match":
                answer_match("", reference)


def check_available(metrics: Sequence[str]) -> None:
    """Raise ValueError for metrics whose library is not installed, before anything is computed."""
    for metric in metrics:
        if metric == "sql_match":
            _require("sqlglot", metric)
        if metric in CORPUS_SCORES:
            _require("sacrebleu", metric)
        if metric in CLASSIFIED:
            _require("sklearn.metrics", metric, "scikit-learn", "classification")


def by_question(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of every prediction, (n,): 1 where it matches one of its references, else 0; or sentence BLEU and chrF, 0 to 100."""
    pairs = list(zip(predictions, references, strict=True))
    if metric in QUESTION_SCORES:
        score = QUESTION_SCORES[metric]
        return [float(any(score(prediction, one) for one in allowed)) for prediction, allowed in pairs]
    sacrebleu = _require("sacrebleu", metric)
    sentence = {"bleu": sacrebleu.sentence_bleu, "chrf": sacrebleu.sentence_chrf}[metric]
    return [float(sentence(prediction, list(allowed)).score) for prediction, allowed in pairs]


def over_all(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int
) -> dict[str, Any]:
    """BLEU or chrF of all predictions together: score, 95 % interval, and sacrebleu's signature of how it was computed."""
    metrics = _require("sacrebleu.metrics", metric)
    computed = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}[metric]()
    most = max(map(len, references))
    # sacrebleu wants the first reference of every question, then the second, ...; None where a question has no more
    columns = [[allowed[k] if k < len(allowed) else None for allowed in references] for k in range(most)]
    score = computed.corpus_score(list(predictions), columns)
    found: dict[str, Any] = {metric: score.score, f"{metric}_signature": computed.get_signature().format()}
    if resamples:
        # sacrebleu's own bootstrap fails where a draw scores 0 (2.6: its mean of Python's and numpy's numbers)
        counts = np.asarray(computed._extract_corpus_statistics(list(predictions), columns))
        drawn = resampled_rows(len(counts), resamples, 0)
        scores = [computed._compute_score_from_stats(list(counts[rows].sum(0))).score for rows in drawn]
        found[f"{metric}_interval"] = percentile_interval(scores)
    return found


def _require(module: str, metric: str, package: str = "", extra: str = "evaluation") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--metric {metric} needs {package or module.partition('.')[0]}: pip install 'rosa-ds[{extra}]'"
        ) from error
