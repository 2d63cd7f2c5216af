"""An exported model in EleutherAI's evaluation harness, on a task of our own: no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import rosa_ds
from rosa_ds.commands import eval
from rosa_ds.config.schema import AdapterConfig, ModelSettings
from rosa_ds.evaluation.harness import harness_metrics
from rosa_ds.export.merge import export_merged
from rosa_ds.models.load import load_model, load_tokenizer
from scripted import CHATML, byte_tokenizer, scripted

TASK = """\
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'rosa-ds[lm-eval]'"
    ),
    pytest.mark.filterwarnings("default"),  # the harness' own, at its import
]
WORDS = ["table", "name", "a", "SELECT"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of four questions."""
    rows = [{"question": f"The {word} of number {n}", "choices": WORDS, "answer": n} for n, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "which_word.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return tmp_path / "tasks"


def test_a_task_by_the_program(tasks: Path, tmp_path: Path) -> None:
    """``rosa-ds eval`` gives the harness' figures, of the model that is in memory."""
    arguments = [
        "tiny",
        "--harness",
        "which_word",
        "--harness-tasks",
        str(tasks),
        "--output",
        str(tmp_path / "out.json"),
    ]
    eval.main(arguments)
    found = json.loads((tmp_path / "out.json").read_text())["harness"]
    right = 0
    model, tokenizer = load_model(ModelSettings(), torch.float32), load_tokenizer(ModelSettings())
    for number, asked in enumerate(WORDS):
        question, scores = f"The {asked} of number {number}", []
        for word in WORDS:
            ids = torch.tensor([tokenizer(f"{question} {word}")["input_ids"]])
            before = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(log_p.gather(1, ids[0, 1:, None])[before - 1 :].sum()))
        right += scores.index(max(scores)) == number
    assert found["which_word"]["acc,none"] == right / 4
    with pytest.raises(ValueError, match=r"--harness no_such_task: lm-eval .* has no such task"):
        harness_metrics(model, tokenizer, ["no_such_task"], tasks)


def test_the_harness_sees_what_the_adapter_model_computes(tasks: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = load_model(ModelSettings(), torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=4, density=0.01, dropout=0.0))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": "tiny"})
    out = export_merged(tmp_path / "adapter", tmp_path / "out", torch.float32)

    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(out), "dtype": "float32"},
        tasks=["which_word"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )

    tokenizer, right = load_tokenizer(ModelSettings()), 0
    for sample in result["samples"]["which_word"]:
        scores = []
        for (context, ending), ((found, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            before = len(tokenizer(context)["input_ids"])
            ids = torch.tensor([tokenizer(context + ending)["input_ids"]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(log_p.gather(1, ids[0, 1:, None])[before - 1 :].sum()))
            assert found == pytest.approx(scores[-1], rel=1e-4), (context, ending)
        right += scores.index(max(scores)) == sample["doc"]["answer"]
    assert len(result["samples"]["which_word"]) == 4
    assert result["results"]["which_word"]["acc,none"] == right / 4


def test_a_text_ends_where_its_turn_ends(tasks: Path) -> None:
    """At the trained end of a turn, which neither the task nor the model's own configuration names."""
    task = (
        TASK.format(rows=tasks.parent / "rows.jsonl")
        .replace("which_word", "say")
        .replace("multiple_choice", "generate_until")
    )
    task = task.replace('doc_to_target: answer\ndoc_to_choice: "{{choices}}"', "doc_to_target: word")
    task = (
        task.replace("metric: acc", "metric: exact_match") + 'generation_kwargs: {until: ["never"], max_gen_toks: 20}\n'
    )
    (tasks / "say.yaml").write_text(task)
    for end, special in (("<im_end>", True), ("</turn>", False)):
        tokenizer = byte_tokenizer(CHATML.replace("<im_end>", end))
        if not special:
            tokenizer.add_tokens([end])
        model = scripted(tokenizer, f"word{end}word")
        found = harness_metrics(model, tokenizer, ["say"], tasks)["say"]
        assert found["exact_match,none"] == 1.0
        assert model.generation_config.eos_token_id == 0
