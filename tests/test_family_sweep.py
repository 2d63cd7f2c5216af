"""The sweep over model families: twenty-nine of different kinds, and every one of the installed transformers at night."""

from __future__ import annotations

import pytest

from family_shapes import Family, families
from family_sweep import CHECKS, Outcome, row, rows_of, sweep, sweep_apart, table, worst

KINDS = (  # noqa: SIM905
    "llama gpt2 gptj gpt_neox opt falcon bloom gemma2 gemma3_text phi3 olmo2 cohere starcoder2 qwen2 qwen3 mixtral "
    "qwen3_moe mamba roberta glm"
).split()
CLASSIFIERS = "llama gpt2 bert roberta distilbert electra mpnet albert ibert".split()  # noqa: SIM905
GATE = [*(Family("causal-lm", name) for name in KINDS), *(Family("classification", name) for name in CLASSIFIERS)]
ALL = [*families("causal-lm"), *families("classification")]


OTHERWISE = {
    Family("causal-lm", "bloom"): {"generation": "transformers"},
    Family("causal-lm", "gemma2"): {"generation": "transformers"},
    Family("causal-lm", "roberta"): {"causal": "refused"},
    Family("classification", "ibert"): dict.fromkeys(("gradients", "merge", "export", "padding"), "refused"),
}
"""What is not right: transformers' generation of batches that are padded on the left, an encoder, and layers of other classes."""
PADDED = ("bloom", "mamba", "roberta")


@pytest.mark.parametrize("family", GATE, ids=str)
def test_a_family(family: Family) -> None:
    found = sweep(family)
    expected = dict.fromkeys(found, "right") | OTHERWISE.get(family, {})
    assert {name: outcome.state for name, outcome in found.items()} == expected, found
    if "packing" in found:
        assert (found["packing"].why == "padded") == (family.name in PADDED)


def test_rows_of_an_earlier_table_stay() -> None:
    llama, glm = Family("causal-lm", "llama"), Family("classification", "glm")
    rows = {
        llama: row({name: Outcome("right") for name in CHECKS} | {"causal": Outcome("refused", "a|b")}, 3.2),
        glm: row({"built": Outcome("not built", "too large")}, 60.0),
    }
    made = table(rows, 5)
    assert "Looked at are 2 of 5: 0 wrong, 1 refused, 0 transformers, 1 not built, 0 right." in made
    assert "2 rows took 1.1 minutes" in made
    assert "| 3 | causal: a/b |" in made
    assert rows_of(made) == rows
    assert table(rows_of(made), 5) == made


@pytest.mark.nightly
@pytest.mark.parametrize("family", ALL, ids=str)
def test_no_family_is_silently_wrong(family: Family) -> None:
    found = sweep_apart(family, 120)
    assert worst(found) != "wrong", found
