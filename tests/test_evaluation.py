"""Metrics against what they are by hand, generation against transformers' own, and both on two ranks."""

from __future__ import annotations

import json
import math
import re
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from launching import ROOT, run
from rosa_ds.commands import eval
from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.evaluation import bootstrap, scores
from rosa_ds.evaluation.causal_lm import load_questions, perplexity, written_metrics
from rosa_ds.evaluation.generate import Generation, generate
from rosa_ds.evaluation.numbers import answer_number
from rosa_ds.evaluation.options import parse
from rosa_ds.models.load import load_model, load_tokenizer

EVAL = str(ROOT / "launch" / "eval.py")


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("select a from T where b='x';", 'SELECT a FROM t WHERE B = "x"', True),
        ("SELECT  COUNT( * ) FROM head -- all", "select count(*) from head", True),
        ("SELECT a FROM t WHERE b = 'X'", "SELECT a FROM t WHERE b = 'x'", False),  # a value, not a name
        ("SELECT b, a FROM t", "SELECT a, b FROM t", False),
        ("SELECT a FROM t", "SELECT a FROM t LIMIT 1", False),
        ("SELECT `a` FROM t AS T1", "SELECT a FROM t AS t1", True),
        ("SELECT COUNT(3 AS x) FROM t", "select  count(3 as x) from t;", True),  # no SQL: as text
        ("I do not know", "SELECT a FROM t", False),
        ("", "SELECT a FROM t", False),
        ("SELECT COUNT(" * 60, "SELECT COUNT(*) FROM t", False),  # deeper than Python's recursion
        ("NOT " * 250, "not " * 250, True),
    ],
)
def test_sql_match(prediction: str, reference: str, same: bool) -> None:
    assert scores.sql_match(prediction, reference) is same


@pytest.mark.parametrize(
    ("prediction", "same"),
    [
        ("so she pays 1,200 dollars.\n#### 1200", True),
        ("The answer is $1200.00.", True),
        ("12 times 100 is 1200", True),
        ("#### 1200 because 3 + 4 = 7", True),
        ("1200 or 7", False),
        ("-1200", False),
        ("I cannot tell", False),
    ],
)
def test_answer_match(prediction: str, same: bool) -> None:
    assert scores.answer_match(prediction, "12 * 100 = <<12*100=1200>>1200\n#### 1,200") is same


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # behind the first mark that a number follows; what comes later is another answer
        ("#### 18\n\nQuestion: next?\n#### 7", "18"),
        ("#### 18####", "18"),
        ("#### 18 #### 7", "18"),
        ("She has 3.\n#### 18\nShe has 3.", "18"),
        ("####\n18\n", "18"),
        ("##### 18", "18"),
        ("#### **18**", "18"),
        ("#### $1,200.", "1200"),
        ("#### 18%", "18"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### Step 1: add 3\nok\n#### Step 2: add 4\nThe answer is 18.", "18"),
        ("#### Step 1: add 3\n#### 18", "18"),
        ("#### The answer is 18\n\nQuestion: 5?\n#### The answer is 7", "18"),
        ("#### Answer\n18", "18"),
        ("so 18\n####", "18"),
        # else in a box, else the last one
        ("\\boxed{18}. There are 3 cars", "18"),
        ("\\boxed{-5}", "-5"),
        ("\\boxed{\\$1{,}200}", "1200"),
        ("\\boxed{x = 18}", "18"),
        ("x = 18", "18"),
        ("\\(18\\)", "18"),
        ("**18**", "18"),
        ("`18`", "18"),
        # signs, and what are none
        ("between 10-18", "18"),
        ("between 10\u201318", "18"),
        ("10 - 18", "18"),
        ("5%-10%", "10"),
        ("$10-$18", "18"),
        ("10\u20ac-18\u20ac", "18"),
        ("COVID-19", "19"),
        ("the answer--18", "18"),
        ("2024-05-18", "18"),
        ("- 5 apples", "5"),
        ("x=-5", "-5"),
        ("(-5)", "-5"),
        ("from 3 to -4", "-4"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("\u22125", "-5"),
        ("10 \u00d7 \u22122", "-2"),
        # commas
        ("The values are 1,2,18", "18"),
        ("1,2,180", "180"),
        ("1, 2, 18", "18"),
        ("12,345,67", "67"),
        ("1,200", "1200"),
        ("1,200,000.50", "1200000.5"),
        ("$1\\,200$", "1200"),
        ("1,\\!200", "1200"),
        ("18,", "18"),
        # the rest
        ("18.", "18"),
        ("18.0", "18"),
        ("$.50", "0.5"),
        ("No.5", "5"),
        ("1.2.3", "3"),
        ("1e3", "1000"),
        ("100%", "100"),
        ("007", "7"),
        ("9007199254740993", "9007199254740993"),  # more than a float holds
        ("minus", None),
        ("-,", None),
        ("", None),
    ],
)
def test_the_number_that_is_the_answer(text: str, number: str | None) -> None:
    assert answer_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("part", ["#", "#### a ", "####\n", "\\boxed{ ", "-", "1,", ",111", "1"])
def test_a_text_that_runs_on_is_read_in_time(part: str) -> None:
    start = time.monotonic()
    answer_number(part * 2000)
    assert time.monotonic() - start < 5


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="the reference 'Paris' has none"):
        scores.answer_match("3", "Paris")


def test_any_reference_counts() -> None:
    assert scores.by_question("exact_match", ["a", "c"], [["b", "a"], ["b"]]) == [1.0, 0.0]


def test_bleu_by_hand() -> None:
    """One sentence, 3 of 4 words and 2, 1, 0 longer runs found; the reference of the nearest length counts."""
    found = scores.over_all(
        "bleu", ["the cat sat here"], [["the cat sat down", "a very long reference of eight words"]], 0
    )
    # sacrebleu's smoothing: a count of 0 among n becomes 1/2 of one
    expected = 100 * math.exp((math.log(3 / 4) + math.log(2 / 3) + math.log(1 / 2) + math.log(1 / 2)) / 4)
    assert found["bleu"] == pytest.approx(expected, rel=1e-6)
    assert "nrefs:var" in found["bleu_signature"] or "nrefs:2" in found["bleu_signature"]
    assert "bleu_interval" not in found


def test_intervals_of_corpora_come_from_the_rows_own_counts() -> None:
    """A draw of every row once is the score itself; draws of score 0 are among the others."""
    for metric in ("bleu", "chrf"):
        predictions, references = (
            ["the cat sat on it", "zz", "a dog runs fast"],
            [["the cat sat on it"], ["qq"], ["a dog ran"]],
        )
        found = scores.over_all(metric, predictions, references, 300)
        assert found[f"{metric}_interval"][0] == 0.0
        assert found[f"{metric}_interval"][1] == pytest.approx(100.0)
        same = scores.over_all(metric, predictions[:1] * 4, references[:1] * 4, 5)
        assert same[f"{metric}_interval"] == [pytest.approx(same[metric])] * 2


def test_more_references_never_lower_a_score() -> None:
    predictions = ["the blue spice is a pub", "a cheap place by the river"]
    one, two = [["blue spice is a pub"], ["cheap"]], [["blue spice is a pub", "the blue spice is a pub"], ["cheap"]]
    for metric in ("bleu", "chrf"):
        low, high = scores.over_all(metric, predictions, one, 50), scores.over_all(metric, predictions, two, 50)
        assert low[metric] < high[metric]
        assert low[f"{metric}_interval"][0] <= low[f"{metric}_interval"][1]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap.mean_interval(generator.random(60) < 0.3, 400, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_weighted_interval_of_a_constant() -> None:
    assert bootstrap.mean_interval([2.0, 2.0, 2.0], 20, weights=[1, 5, 100]) == [2.0, 2.0]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(scores.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"--metric bleu needs sacrebleu: pip install 'rosa-ds\[evaluation\]'"):
        scores.check_available(["exact_match", "bleu"])


# -- questions and generation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return load_model(ModelSettings(), torch.float32)


def test_rows_with_one_prompt_are_one_question(tmp_path: Path) -> None:
    rows = [
        ("name[A], eatType[pub]", "A is a pub."),
        ("name[B]", "B."),
        ("name[A], eatType[pub]", "There is a pub, A. "),
    ]
    (tmp_path / "e2e.csv").write_text("mr,ref\n" + "\n".join(f'"{mr}","{ref}"' for mr, ref in rows))
    settings = DataSettings(prompt_column="mr", completion_column="ref")
    questions = load_questions(str(tmp_path / "e2e.csv"), load_tokenizer(ModelSettings()), settings)
    assert [question.references for question in questions] == [("A is a pub.", "There is a pub, A."), ("B.",)]


def test_greedy_generation_is_transformers_own_one_by_one(tiny: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer(ModelSettings())
    prompts = [q.prompt for q in load_questions("builtin:sql[:5]", tokenizer, DataSettings())]
    expected = []
    for prompt in prompts:
        ids = tiny.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
    assert generate(tiny, tokenizer, prompts, Generation(batch_size=2, max_new_tokens=12)) == expected


def test_sampling_depends_on_its_seed_alone(tiny: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer(ModelSettings())
    prompts = [q.prompt for q in load_questions("builtin:sql[:4]", tokenizer, DataSettings())]
    how = Generation(batch_size=2, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)
    torch.manual_seed(0)
    first = generate(tiny, tokenizer, prompts, how)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after  # nobody else's random numbers are used up
    torch.manual_seed(9)
    assert generate(tiny, tokenizer, prompts, how) == first
    other = Generation(batch_size=2, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=4)
    assert generate(tiny, tokenizer, prompts, other) != first
    cold = Generation(batch_size=2, max_new_tokens=12, temperature=1e-4)
    assert generate(tiny, tokenizer, prompts, cold) == generate(
        tiny, tokenizer, prompts, Generation(batch_size=2, max_new_tokens=12)
    )


def test_a_models_own_penalties_do_not_count(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(ModelSettings())
    prompts = [q.prompt for q in load_questions("builtin:sql[:2]", tokenizer, DataSettings())]
    expected = generate(tiny, tokenizer, prompts, Generation(max_new_tokens=12))
    own = GenerationConfig(repetition_penalty=9.0, eos_token_id=tiny.generation_config.eos_token_id)
    monkeypatch.setattr(tiny, "generation_config", own)
    assert generate(tiny, tokenizer, prompts, Generation(max_new_tokens=12)) == expected
    assert tiny.generation_config is own


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "--batch-size and --max-new-tokens are 1 or more"),
        ({"temperature": -1.0}, "--temperature is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p above 0"),
        ({"top_p": 0.5}, "no meaning for greedy"),
    ],
)
def test_wrong_ways_to_generate(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(**wrong)  # type: ignore[arg-type]


def test_a_prompt_beyond_the_model(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(
        ValueError, match=r"the longest prompt has 9 tokens, and with --max-new-tokens \d+ .* positions"
    ):
        generate(tiny, load_tokenizer(ModelSettings()), [[1] * 9], Generation(max_new_tokens=10**6))


# -- whole evaluations ---------------------------------------------------------------------------------------------


def test_perplexity_row_by_row(tiny: LlamaForCausalLM) -> None:
    """Against each row's own loss, as transformers computes it."""
    tokenizer = load_tokenizer(ModelSettings())
    from rosa_ds.data.prepare import prepare

    data = prepare("builtin:sql[:7]", "eval", tokenizer, DataSettings())
    total = 0.0
    for number in range(len(data)):
        tokens = data.tokens(number)
        labels = [token if trained else -100 for token, trained in zip(tokens.ids, tokens.trained, strict=True)]
        with torch.no_grad():
            loss = tiny(input_ids=torch.tensor([tokens.ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * int(data.trained[number])
    found = perplexity(tiny, tokenizer, "builtin:sql[:7]", DataSettings(), 3)
    assert found["loss"] == pytest.approx(total / data.trained.sum(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["perplexity_interval"][0] < found["perplexity"] < found["perplexity_interval"][1]


def test_what_is_reported_adds_up(tiny: LlamaForCausalLM) -> None:
    found = written_metrics(
        tiny,
        load_tokenizer(ModelSettings()),
        "builtin:sql[:6]",
        DataSettings(),
        ["exact_match", "chrf"],
        Generation(batch_size=4, max_new_tokens=8),
    )
    assert found["rows"] == len(found["samples"]) == 6
    for sample in found["samples"]:
        assert set(sample) == {"prompt", "references", "prediction", "scores"}
        assert sample["scores"]["exact_match"] == (sample["prediction"] in sample["references"])
    assert found["exact_match"] == np.mean([sample["scores"]["exact_match"] for sample in found["samples"]])
    assert found["chrf_interval"][0] <= found["chrf"] <= found["chrf_interval"][1]


@pytest.mark.ranks
def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    arguments = (
        "tiny",
        "--data",
        "builtin:sql[:9]",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "6",
        "--temperature",
        "0.8",
    )
    metrics = ("--metric", "exact_match", "--metric", "chrf", "--metric", "perplexity")
    results = []
    for launcher, ranks in (("fork", 1), ("torchrun", 2)):
        output = f"{launcher}.json"
        run(launcher, ranks, EVAL, *arguments, *metrics, "--output", output, cwd=tmp_path)
        results.append(json.loads((tmp_path / output).read_text()))
    one, two = results
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    for figures in results:  # follow from the loss
        figures.pop("perplexity"), figures.pop("perplexity_interval")
    assert two == one


def test_settings_of_rows_are_the_runs(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    data = {
        "separator": " | ",
        "too_long": "truncate",
        "max_length": 99,
        "prompt_column": "mr",
        "completion_column": "ref",
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": data}))
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    for path in (tmp_path / "run", tmp_path / "run" / "adapter"):
        rows = parse([str(path), "--data", "x", "--max-length", "50"]).rows
        assert (rows.separator, rows.too_long, rows.max_length, rows.prompt_column) == (" | ", "truncate", 50, None)
    assert parse(["tiny", "--data", "x"]).rows == DataSettings()


def test_wrong_command_lines(tmp_path: Path) -> None:
    program = eval.main
    for arguments, message in (
        (["tiny"], "give --data, or --harness"),
        (["tiny", "--metric", "bleu", "--harness", "x"], "--metric bleu needs --data"),
        (["tiny", "--data", "builtin:sql[:2]", "--unmerged"], "--unmerged is for runs"),
        (["tiny", "--data", "builtin:sql[:2]", "--bootstrap", "-1"], "--bootstrap is 0 or more"),
        (["tiny", "--data", str(tmp_path / "nothing.jsonl")], "no such file"),
        (["tiny", "--data", "builtin:sql", "--prompt-template", "{a}"], "belong together"),
        (["tiny", "--data", "builtin:sql", "--metric", "mcc"], "--metric mcc: tiny is a language model"),
        (["tiny", "--data", "builtin:sql[:3]", "--metric", "answer_match"], "has none: use exact_match"),
        (["tiny", "--data", "builtin:sql", "--template-arguments", "[1]"], 'is a JSON object, as {"enable_thinking"'),
        (
            ["tiny", "--data", "builtin:sql", "--template-arguments", '{"a": 1}'],
            "gives 'a', which the chat template does not use",
        ),
        (["tiny", "--data", "builtin:sql", "--chat-template", "none.jinja"], "none.jinja: no such file"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            program(arguments)
