"""The sweep over model families: twenty-eight of different kinds, and every one of the installed transformers at night."""

from __future__ import annotations

import pytest

from family_shapes import Family, families
from family_sweep import sweep, sweep_apart, worst

KINDS = (  # noqa: SIM905
    "llama gpt2 gptj gpt_neox opt falcon bloom gemma2 gemma3_text phi3 olmo2 cohere starcoder2 qwen2 qwen3 mixtral "
    "qwen3_moe mamba roberta glm"
).split()
CLASSIFIERS = "llama gpt2 bert roberta distilbert electra mpnet albert".split()  # noqa: SIM905
GATE = [*(Family("causal-lm", name) for name in KINDS), *(Family("classification", name) for name in CLASSIFIERS)]
ALL = [*families("causal-lm"), *families("classification")]


OTHERWISE = {
    Family("causal-lm", "bloom"): {"generation": "transformers"},
    Family("causal-lm", "gemma2"): {"generation": "transformers"},
    Family("causal-lm", "roberta"): {"causal": "refused"},
}
"""What is not right: transformers' generation of batches that are padded on the left, and an encoder."""
PADDED = ("bloom", "mamba", "roberta")


@pytest.mark.parametrize("family", GATE, ids=str)
def test_a_family(family: Family) -> None:
    found = sweep(family)
    expected = dict.fromkeys(found, "right") | OTHERWISE.get(family, {})
    assert {name: outcome.state for name, outcome in found.items()} == expected, found
    if "packing" in found:
        assert (found["packing"].why == "padded") == (family.name in PADDED)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ALL, ids=str)
def test_no_family_is_silently_wrong(family: Family) -> None:
    found = sweep_apart(family, 120)
    assert worst(found) != "wrong", found
