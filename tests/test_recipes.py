"""Every recipe is read and planned, with a model of its family and rows of its columns in place of what a hub has."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, RobertaConfig

from launching import ROOT
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.config.schema import ModelSettings
from rosa_ds.models.load import load_tokenizer
from rosa_ds.planning.dry_run import dry_run

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.json"))
LAYERS = {"num_hidden_layers": 2}
MODELS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, **LAYERS
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        **LAYERS,
    ),
    "openai-community/gpt2": GPT2Config(n_layer=2),
    "FacebookAI/roberta-base": RobertaConfig(max_position_embeddings=514, **LAYERS),
}
ROWS: dict[str, dict[str, str]] = {
    "openai/gsm8k": {"question": "How many are 2 and 3?", "answer": "2 + 3 = 5\n#### 5"},
    "b-mc2/sql-create-context": {
        "question": "How many heads?",
        "context": "CREATE TABLE head (age INTEGER)",
        "answer": "SELECT COUNT(*) FROM head",
    },
    "nyu-mll/glue@cola": {"sentence": "They drank the pub.", "label": "0"},
    "nyu-mll/glue@mrpc": {"sentence1": "He ate.", "sentence2": "He was eating.", "label": "1"},
    "viggo": {"mr": "inform(name[Worms])", "ref": "Worms is a game."},
    "e2e": {"mr": "name[The Vaults], food[Thai]", "ref": "The Vaults serves Thai food."},
}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


def _stand_ins(recipe: dict[str, Any], folder: Path) -> list[str]:
    """Arguments that give a recipe's run what the hub or the user would have."""
    arguments = []
    name = recipe["rosa"]["model"]["name_or_path"]
    if name != "tiny":
        model = folder / "model"
        MODELS[name].save_pretrained(model)
        tokenizer = load_tokenizer(ModelSettings())
        if not name.endswith("Instruct"):
            tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
        arguments += ["--model.name_or_path", str(model)]
    for purpose in ("train", "eval"):
        source = recipe["rosa"]["data"][purpose]
        if source == "builtin:sql":
            continue
        row = next(row for key, row in ROWS.items() if source.startswith(key))
        with (folder / f"{purpose}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            writer.writeheader()
            writer.writerows([row] * 40)
            if "label" in row:  # two classes
                writer.writerows([row | {"label": str(1 - int(row["label"]))}] * 40)
        arguments += [f"--data.{purpose}", str(folder / f"{purpose}.csv")]
    return arguments


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = json.loads(path.read_text())
    command = parse_command_line(["--config", str(path), "--dry-run", *_stand_ins(recipe, tmp_path)])
    with caplog.at_level(logging.INFO, "rosa_ds"):
        dry_run(command, 1)
    warned = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    # the stand-in's 40 rows are too few for any recipe's schedule; the ROSA paper's weight decay on GLUE is what it is
    known = ("steps of training", "steps find the mask", "training.weight_decay 0.1 shrinks what is drawn")
    assert not [said for said in warned if not any(words in said for words in known)]
    assert command.config.training.output_dir == f"runs/{path.stem}"
    assert "a rank of 1" in caplog.text
    assert ("⟦" in caplog.text) == (command.config.model.task == "causal-lm")


def test_the_papers_settings() -> None:
    """RoSA's released hyper-parameters, by what a run would use."""
    ranks = {
        "gsm8k": (16, 0.018),
        "viggo": (16, 0.006),
        "sql": (4, 0.0045),
        "gsm8k_nf4": (16, 0.006),
        "viggo_nf4": (8, 0.009),
    }
    for task, (rank, density) in ranks.items():
        command = parse_command_line(["--config", str(ROOT / "launch" / "recipes" / f"llama2_7b_{task}.json")])
        settings, adapter = command.config, command.config.adapter
        assert (settings.method, adapter.rank, adapter.density) == ("robust", rank, density)
        assert (adapter.alpha, adapter.dropout, settings.data.max_length) == (16, 0.05, 512)
        assert (settings.training.epochs, settings.training.warmup_steps, settings.training.seed) == (1, 20, 42)
        assert command.deepspeed["train_batch_size"] == 32
        expected = (1e-3, 1e-4) if task == "viggo_nf4" else (7e-4, 2e-4)
        assert (adapter.low_rank_lr, adapter.sparse_lr) == expected
        assert settings.model.quantization == ("nf4" if task.endswith("nf4") else "none")
