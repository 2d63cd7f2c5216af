"""Bases and rows from a hub: downloaded once a node, whatever the number of ranks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import Hub, serving
from launching import ROOT, TRAIN, run
from rosa_ds.models.load import TINY_FOLDER

EVAL = str(ROOT / "launch" / "eval.py")
ARGUMENTS = (
    *("--model.name_or_path", "someone/small", "--data.train", "someone/rows", "--data.eval", "someone/rows:test[:4]"),
    *("--method", "lora", "--training.max_steps", "2", "--training.warmup_steps", "0", "--ds.train_batch_size", "4"),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(TINY_FOLDER, model)
    data.mkdir()
    (data / "README.md").write_text("---\nlicense: mit\n---\n")
    for split, count in (("train", 40), ("test", 8)):
        rows = [{"prompt": f"say {number}", "completion": str(number)} for number in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving({"someone/small": model}, {"someone/rows": data}) as found:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield found


def use_cache(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hub.environment(cache).items():
        monkeypatch.setenv(name, value)


@pytest.mark.ranks
def test_the_first_rank_alone_asks_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for ranks in (1, 3):
        use_cache(hub, tmp_path / f"cache-{ranks}", monkeypatch)
        output = ("--training.output_dir", str(tmp_path / f"run-{ranks}"))
        run("torchrun", ranks, TRAIN, *ARGUMENTS, *output, cwd=tmp_path)
        asked.append(Counter(hub.requests))
        hub.requests.clear()
    one, three = asked
    assert one["GET someone/small/resolve/main/model.safetensors"] == 1
    assert sum("train.jsonl" in request and request.startswith("GET") for request in one) == 1
    assert three == one


@pytest.mark.ranks
def test_an_evaluation_asks_once_too(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, figures = [], []
    for ranks in (1, 2):
        use_cache(hub, tmp_path / f"cache-{ranks}", monkeypatch)
        output = tmp_path / f"{ranks}.json"
        words = ("someone/small", "--data", "someone/rows:test", "--metric", "perplexity", "--output", str(output))
        run("torchrun", ranks, EVAL, *words, cwd=tmp_path)
        figures.append(json.loads(output.read_text())["loss"])
        asked.append(Counter(hub.requests))
        hub.requests.clear()
    assert asked[0] == asked[1]
    assert (
        sum(request.startswith("GET") and request.endswith("/model.safetensors") for request in asked[0].elements())
        == 1
    )
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)


@pytest.mark.ranks
def test_a_name_that_the_hub_has_not(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message that says what is wrong, and not that the other ranks were not to ask."""
    use_cache(hub, tmp_path / "cache", monkeypatch)
    output = run("torchrun", 2, TRAIN, *ARGUMENTS, "--model.name_or_path", "someone/smal", cwd=tmp_path, status=1)
    assert "'someone/smal' cannot be loaded" in output
    assert "another rank failed" in output
    assert "offline" not in output.lower()
