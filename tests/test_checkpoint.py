"""Folders that are whole or not there, checkpoints that are checked before they are trusted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rosa_ds.checkpoints import checkpoint, deepspeed_format
from rosa_ds.checkpoints.checkpoint import Checkpoint, Identity
from rosa_ds.checkpoints.resume import check_resumable
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.metrics import MetricsLog
from rosa_ds.utils.files import (
    TensorFiles,
    describe_files,
    manifest_problem,
    move_aside,
    write_json,
    write_manifest,
    write_tensors,
    written_folder,
)

BASE = {"name_or_path": "tiny", "revision": None, "hash": "abc"}


def make(step: int = 3, **changes: Any) -> Checkpoint:
    values = {
        "step": step,
        "trained": {"layer.A": torch.arange(6.0).view(2, 3)},
        "moments": {"layer.A/exp_avg": torch.ones(2, 3)},
        "positions": {"layer.weight": torch.tensor([1, 5], dtype=torch.int32)},
        "collected": {"layer": torch.full((2, 2), 0.5)},
        "base_changes": {},
        "phase": "train",
        "evaluation_due": False,
        "collected_steps": 1,
        "optimizer_scalars": {"low_rank": {"step": 3.0}},
        "loss_scaler": {},
        "trained_tokens": 99,
        "config": RunConfig().model_dump(),
        "batch_size": 16,
        "base": BASE,
        "data": "d",
    }
    return Checkpoint(**(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    saved = make()
    folder, size, _ = checkpoint.save(tmp_path, saved, keep=2)
    assert size == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    loaded = checkpoint.load(checkpoint.find(tmp_path, ""))
    for name in ("trained", "moments", "positions", "collected"):
        before, after = getattr(saved, name), getattr(loaded, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    plain = (
        "step",
        "collected_steps",
        "optimizer_scalars",
        "trained_tokens",
        "config",
        "batch_size",
        "base",
        "data",
    )
    assert all(getattr(saved, name) == getattr(loaded, name) for name in plain)


def test_keeps_the_newest_and_names_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, make(step), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-000002", "step-000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_going_back_keeps_the_new_checkpoint_and_the_old_timeline(tmp_path: Path) -> None:
    """A run resumed from an older checkpoint saves smaller step numbers than lie there already."""
    for step in (3, 4):
        checkpoint.save(tmp_path, make(step), keep=2)
    folder, _, _ = checkpoint.save(tmp_path, make(1), keep=2)
    assert folder.is_dir()
    checkpoint.folders(tmp_path).set_aside_later(1)
    assert checkpoint.find(tmp_path, "") == folder
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["abandoned-step-000003", "abandoned-step-000004", "latest", "step-000001"]
    checkpoint.save(tmp_path, make(3), keep=2)
    checkpoint.folders(tmp_path).set_aside_later(1)
    assert (tmp_path / "checkpoints" / "abandoned-step-000003.1").is_dir()


def test_a_step_saved_again_is_there_at_every_moment(tmp_path: Path) -> None:
    """Killed between the two renames, the older one gets its name back; afterwards the newer one has it."""
    first, _, _ = checkpoint.save(tmp_path, make(2), keep=2)
    old = {path.name: path.read_bytes() for path in first.iterdir()}
    first.rename(first.with_name(f".{first.name}.discarded"))
    first.with_name(f".{first.name}.partial").mkdir()
    checkpoint.folders(tmp_path).clean()
    assert {path.name: path.read_bytes() for path in first.iterdir()} == old
    checkpoint.save(tmp_path, make(2, trained={"layer.A": torch.zeros(2, 3)}), keep=2)
    assert not checkpoint.load(first).trained["layer.A"].any()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000002"]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make(1), keep=1)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 is not written: .*No space left .*: make room in .*--resume"
    ):
        checkpoint.save(tmp_path, make(2), keep=1)
    assert checkpoint.find(tmp_path, "").name == "step-000001"
    assert checkpoint.load(checkpoint.find(tmp_path, "")).step == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "no manifest", "leads out"])
def test_damage_is_found_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, make(step), keep=2)
    folder = tmp_path / "checkpoints" / "step-000002"
    path = folder / "trained-00000.safetensors"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "leads out":
        (tmp_path / "outside").write_bytes(b"x")
        entries = describe_files([tmp_path / "outside"])
        write_manifest(folder, {"../../outside": entries["outside"]})
    else:
        (folder / "manifest.json").unlink()
    assert manifest_problem(folder)
    assert checkpoint.find(tmp_path, "").name == "step-000001"
    with pytest.raises(ValueError, match="use another checkpoint of the run"):
        checkpoint.find(tmp_path, str(folder))


def test_a_disk_that_fails_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "trained").symlink_to("/proc/self/mem")  # opens, has no bytes, and cannot be read
    write_manifest(tmp_path, {"trained": {"bytes": 0, "sha256": ""}})
    assert manifest_problem(tmp_path) == "trained cannot be read: Input/output error"


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint: start without --resume"):
        checkpoint.find(tmp_path, "")
    folder, _, _ = checkpoint.save(tmp_path, make(), keep=1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpoint.find(tmp_path, "")


def test_a_half_written_checkpoint_is_not_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(1), keep=2)
    (tmp_path / "checkpoints" / ".step-000002.partial").mkdir()
    assert checkpoint.find(tmp_path, "").name == "step-000001"
    checkpoint.save(tmp_path, make(2), keep=2)
    assert not (tmp_path / "checkpoints" / ".step-000002.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": RunConfig(adapter={"rank": 3}).model_dump()}, "adapter.rank was 16 and is 3 now"),
        ({"config": RunConfig(training={"seed": 1}).model_dump()}, "training.seed was 42 and is 1 now"),
        ({"batch_size": 32}, "train_batch_size was 16 and is 32 now"),
        ({"base": BASE | {"hash": "x"}}, "are not those that the run began with"),
        ({"data": "e"}, "examples of data.train are not those that the run began with"),
        (
            {"config": RunConfig().model_dump() | {"deepspeed": {"optimizer": "Adam"}}},
            "deepspeed.optimizer was None and is 'Adam' now",
        ),
    ],
    ids=["rank", "seed", "batch", "base", "data", "optimizer"],
)
def test_changes_that_stop_a_resume(change: dict[str, Any], message: str) -> None:
    now = {"config": RunConfig().model_dump(), "batch_size": 16, "base": BASE, "data": "d"}
    check_resumable(make(), Identity(**now))
    with pytest.raises(ValueError, match=message):
        check_resumable(make(), Identity(**(now | change)))


def test_changes_that_do_not() -> None:
    training = {"save_steps": 7, "output_dir": "elsewhere", "gradient_checkpointing": True}
    config = RunConfig(training=training, data={"eval": "builtin:sql[:3]"}).model_dump()
    check_resumable(make(), Identity(config, 16, BASE, "d"))
    before, now = (RunConfig(training={"max_steps": 9, "epochs": epochs}).model_dump() for epochs in (1, 3))
    check_resumable(make(config=before), Identity(now, 16, BASE, "d"))  # epochs have no effect beside max_steps


def test_other_format_version(tmp_path: Path) -> None:
    folder, _, _ = checkpoint.save(tmp_path, make(), keep=1)
    state = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", state | {"format_version": 99})
    write_manifest(folder)
    with pytest.raises(ValueError, match="has format 99, this rosa_ds reads 2: it was written by a newer one"):
        checkpoint.load(folder)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with written_folder(target) as temporary:
        (temporary / "a").write_text("1")

    def interrupted() -> None:
        with written_folder(target) as temporary:
            (temporary / "a").write_text("2")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert (target / "a").read_text() == "1"
    with written_folder(target) as temporary:
        (temporary / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    with written_folder(target) as temporary:
        (temporary / "a").write_text("1")
    true = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(5, "Input/output error", str(path))
        return true(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"), written_folder(target) as temporary:
        (temporary / "a").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "1"


def test_metrics_of_a_run_that_goes_on_from_step_0(tmp_path: Path) -> None:
    """A mask needs no step of training: what was written before it stays."""
    log = MetricsLog(tmp_path, False, 0)
    log.write(step=0, event="eval", loss=float("nan"))
    log.write(step=0, event="mask", seconds=1.0)
    log.close()
    MetricsLog(tmp_path, False, 0).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["eval", "mask"]
    assert lines[0]["loss"] is None


@pytest.mark.parametrize("evaluation_due", [False, True])
def test_metrics_of_a_resumed_run_have_nothing_twice(tmp_path: Path, evaluation_due: bool) -> None:
    """A draw comes after its step's checkpoint, and so does an evaluation that was still due."""
    written = [(2, "draw"), (2, "train"), (4, "train"), (4, "eval"), (4, "save"), (4, "draw"), (6, "train")]
    with contextlib.closing(MetricsLog(tmp_path, False, 0)) as log:
        for step, event in written:
            log.write(step=step, event=event)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "eve')  # killed while it wrote
    MetricsLog(tmp_path, False, 4, evaluation_due).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = written[:5] if not evaluation_due else [*written[:3], written[4]]
    assert [(line["step"], line["event"]) for line in lines] == wanted


def test_deepspeeds_files_of_another_version(tmp_path: Path) -> None:
    torch.save({"rosa_ds": {"state": {"later": 1}, "groups": {}}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="has format None, this rosa_ds reads 2: go on with the one that wrote it"):
        deepspeed_format.read(tmp_path)


def test_moved_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        assert move_aside(tmp_path / "run") == tmp_path / f"run.{number}"


def test_unreadable_tensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        TensorFiles([tmp_path / "x.safetensors"])
    with pytest.raises(OSError, match="cannot be written"):
        write_tensors(tmp_path / "missing" / "x.safetensors", {"a": torch.ones(1)})
