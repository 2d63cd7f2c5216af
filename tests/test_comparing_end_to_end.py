"""A real study: the built-in model trained, evaluated and reported by the command that users type."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import launching
from rosa_ds.adapters.folder import open_adapter
from rosa_ds.checkpoints import folder_lock
from rosa_ds.commands import compare

LR = "adapter.low_rank_lr"
STUDY = {
    "name": "real",
    "settings": {
        "data.train": "builtin:sql[:24]", "training.max_steps": 2, "training.warmup_steps": 0, "ds.train_batch_size": 4,
        "adapter.rank": 4,
    },
    "validation": "builtin:sql[:8]",
    "variants": {
        "lora": {"method": "lora"},
        "robust": {"method": "robust", "adapter.density": 0.02, "mask.warmup_steps": 0},
    },
    "tune": {LR: [1e-3, 1e-2]},
    "seeds": [1, 2],
    "evaluate": [{"data": "builtin:sql[8:16]", "metric": "exact_match", "options": {"max-new-tokens": 4}}],
    "reference": "lora",
}  # fmt: skip


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[list[str]], None]]:
    """``rosa-ds compare`` in this process, which saves its start; the programs that it starts are real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    held = list(folder_lock._held)
    yield compare.main
    for stream in folder_lock._held[len(held) :]:
        stream.close()
    folder_lock._held[:] = held


def test_a_study_of_the_built_in_model(tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    study = tmp_path / "study.json"
    study.write_text(json.dumps(STUDY))
    main([str(study), "--output", "out", "--jobs", "2"])
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    assert {run["state"] for run in found["trials"] + found["finals"]} == {"finished"}
    for variant in STUDY["variants"]:
        losses = {
            run["choice"][LR]: run["figures"]["validation loss"] for run in found["trials"] if run["variant"] == variant
        }
        best = min(losses, key=lambda value: losses[value])
        finals = [run for run in found["finals"] if run["variant"] == variant]
        assert [run["choice"][LR] for run in finals] == [best] * 2
        own = [_validation_loss(out / run["folder"]) for run in finals]
        assert own[0] == losses[best]
        assert own[0] != own[1]
        summary = found["summaries"][variant]["validation loss"]
        assert summary["mean"] == pytest.approx(sum(own) / 2)
        assert summary["sd"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))
        assert {run["trained_parameters"] for run in finals} == {_trained(out / finals[0]["folder"])}
    pair = next(entry for entry in found["comparisons"] if entry["metric"] == "exact_match")
    assert pair["rows"]["rows"] == 8
    text = (out / "report.md").read_text()
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(pictures) == 6  # two metrics, losses, tuning, singular values, masks
    for picture in pictures:
        with Image.open(out / picture) as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert not list(out.rglob("checkpoints"))


def _validation_loss(folder: Path) -> float:
    return [line["loss"] for line in launching.metrics(folder / "run") if line.get("event") == "eval"][-1]


def _trained(folder: Path) -> int:
    return sum(tensor.numel() for tensor in open_adapter(folder / "run/adapter").trained.values())


def test_what_cannot_work_is_found_before_anything_is_run(tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    study = tmp_path / "study.json"
    study.write_text(json.dumps(STUDY | {"evaluate": [{"data": "builtin:sql", "metric": "exact_mach"}]}))
    with pytest.raises(ValueError, match=r"evaluate builtin:sql: [^$]*invalid choice: 'exact_mach'"):
        main([str(study), "--output", "out"])
    for wrong, message in (
        ({"metric": "accuracy"}, "metric accuracy is not one of model.task causal-lm"),
        ({"options": {"bootstrap": -1}}, "--bootstrap is 0 or more"),
        ({"options": {"temperature": -3}}, "--temperature is 0"),
    ):
        study.write_text(json.dumps(STUDY | {"evaluate": [{"data": "builtin:sql", "metric": "exact_match"} | wrong]}))
        with pytest.raises(ValueError, match=rf"evaluate builtin:sql: {message}"):
            main([str(study), "--output", f"out {message}"])  # each call holds its folder until the process ends
    with pytest.raises(ValueError, match=r"--jobs is 1 or more, given 0"):
        main([str(study), "--output", "out", "--jobs", "0"])
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_their_extra(
    tmp_path: Path, main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else object())
    with pytest.raises(ValueError, match=r"rosa-ds compare needs scipy: pip install 'rosa-ds\[compare\]'"):
        main(["study.json", "--output", "out"])


def test_two_do_not_write_to_one_folder(tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    (tmp_path / "study.json").write_text(json.dumps(STUDY | {"seeds": []}))
    with pytest.raises(ValueError, match=r"seeds: list should have"):
        main(["study.json", "--output", "out"])
    with pytest.raises(ValueError, match=r"--output .*out: a run is writing there"):
        main(["study.json", "--output", "out"])
