"""Studies: what their files may say, which runs are done and done again, and what is said of their figures."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rosa_ds
from launching import ROOT
from rosa_ds.checkpoints import folder_lock
from rosa_ds.comparing import children
from rosa_ds.comparing.children import Children
from rosa_ds.comparing.planned import plan_finals, plan_trials
from rosa_ds.comparing.run_study import Options, run_study
from rosa_ds.comparing.runner import Programs, places
from rosa_ds.comparing.study import read_study
from rosa_ds.config.schema import AdapterConfig, ModelSettings
from rosa_ds.models.load import identify, load_model
from rosa_ds.utils.errors import InterruptedRunError, RunError
from rosa_ds.utils.files import write_manifest

FAKE = ROOT / "tests" / "support" / "fake_run.py"
LR = "adapter.low_rank_lr"
STUDY: dict[str, Any] = {
    "name": "small",
    "settings": {"training.max_steps": 2},
    "variants": {"plain": {"method": "lora"}, "good": {"method": "robust", "adapter.rank": 4}},
    "tune": {LR: [1e-4, 1e-3, 1e-2]},
    "seeds": [1, 2],
    "evaluate": [{"data": "builtin:sql"}],
    "reference": "plain",
}


@pytest.fixture(scope="module")
def robust_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole adapter of the built-in model: what the fake program leaves."""
    folder = tmp_path_factory.mktemp("fake") / "adapter"
    model = load_model(ModelSettings(), torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=2, density=0.01), seed=0)
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    rosa_ds.save_adapter(model, folder, identify(ModelSettings()))
    return folder


class Workshop:
    """A study's file, a folder for its runs, and the fake programs."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        self.fake, self.output, self.path = folder / "fake", folder / "out", folder / "study.json"
        (self.fake / "checkpoint").mkdir(parents=True)
        write_manifest(self.fake / "checkpoint")
        (self.fake / "adapter").symlink_to(adapter)

    def write(self, **changes: Any) -> Path:
        self.path.write_text(json.dumps(STUDY | changes))
        return self.path

    def run(self, **options: Any) -> list[str]:
        """Do a study; the calls of programs that it took."""
        calls = self.fake / "calls"
        calls.unlink(missing_ok=True)
        program = [sys.executable, "-S", str(FAKE), str(self.fake)]
        try:
            run_study(Options(self.path, self.output, **options), Programs([*program, "train"], [*program, "evaluate"]))
        finally:
            self.calls = calls.read_text().splitlines() if calls.exists() else []
        return self.calls

    def results(self) -> dict[str, Any]:
        return json.loads((self.output / "results.json").read_text())

    def report(self) -> str:
        return (self.output / "report.md").read_text()


@pytest.fixture
def drawn(tmp_path: Path, robust_adapter: Path) -> Workshop:
    made = Workshop(tmp_path, robust_adapter)
    made.write()
    return made


@pytest.fixture
def workshop(drawn: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Without pictures, which take most of the time here."""
    monkeypatch.setattr("rosa_ds.comparing.run_study.draw_plots", lambda *arguments: {})
    monkeypatch.setattr("rosa_ds.comparing.run_study.read_updates", lambda results: ({}, []))
    return drawn


def test_a_study_from_begin_to_end(drawn: Workshop) -> None:
    workshop, calls = drawn, drawn.run()
    # the best trial has the settings of a final run of its seed, which is not trained twice
    assert sum(call.startswith("train") for call in calls) == 6 + 2
    assert sum(call.startswith("evaluate") for call in calls) == 4
    found = workshop.results()
    assert {run["choice"][LR] for run in found["finals"]} == {1e-3}
    assert [run["name"] for run in found["finals"]] == [f"{v}/final-seed{s}" for s in (1, 2) for v in ("plain", "good")]
    matches = {variant: found["summaries"][variant]["exact_match"] for variant in ("plain", "good")}
    assert matches["plain"] == {"count": 2, "mean": 0.625, "sd": pytest.approx(0.125 * 2**0.5)}
    assert matches["good"]["mean"] == 0.875
    assert found["summaries"]["good"]["validation loss"]["mean"] == pytest.approx(1.015)
    first = found["comparisons"][0]
    assert (first["variant"], first["reference"], first["metric"]) == ("good", "plain", "exact_match")
    assert first["seeds"]["differences"] == {"1": 0.25, "2": 0.25}
    assert first["seeds"]["t_p"] is first["seeds"]["sign_p"] is None  # of two pairs
    assert first["rows"] == {"rows": 4, "seeds": 2, "mean": 0.25, "low": 0.0, "high": pytest.approx(0.5, abs=0.13)}
    model = load_model(ModelSettings(), torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=2, density=0.01))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert {run["trained_parameters"] for run in found["finals"]} == {trained}
    assert found["cpu_hours"] * 3600 == pytest.approx(
        sum(a["cpu_seconds"] for r in _runs(found) for a in r["attempts"])
    )
    text = workshop.report()
    assert f"| good | {trained:,} | 2 of 2 | 0.875 ± 0.1768 | 1.015 ± 0.007071 | 1.00 |" in text
    assert f"| plain | {LR} 0.001 | **1.01** |" in text
    assert "at the edge" not in text
    for picture in (part.split(")")[0] for part in text.split("](")[1:]):
        assert (workshop.output / picture).read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(workshop.output.rglob("checkpoints"))


def _runs(found: dict[str, Any]) -> list[dict[str, Any]]:
    return list({run["folder"]: run for run in [*found["trials"], *found["finals"]]}.values())


def test_only_what_has_changed_is_done_again(workshop: Workshop) -> None:
    workshop.run()
    assert workshop.run() == []
    workshop.write(variants=STUDY["variants"] | {"good": {"method": "robust", "adapter.rank": 8}}, seeds=[1, 2, 3])
    assert sorted({call.split("/runs/")[1].split("/")[0] for call in workshop.run()}) == ["good", "plain"]
    trained = [call.split("/runs/")[1] for call in workshop.calls if call.startswith("train")]
    assert sorted(name for name in trained if name.startswith("plain")) == ["plain/final-seed3/config.json"]
    assert len([name for name in trained if name.startswith("good")]) == 3 + 2
    assert (workshop.output / "runs/good/final-seed2.1/result.json").is_file()  # the old one is kept
    workshop.path.write_text(
        json.dumps(json.loads(workshop.path.read_text()) | {"evaluate": [{"data": "builtin:sql[:9]"}]})
    )
    assert len(workshop.run()) == 6
    assert all(call.startswith("evaluate") for call in workshop.calls)


def test_a_failed_run_is_told_and_the_others_go_on(workshop: Workshop) -> None:
    (workshop.fake / "fail").write_text("plain/trial3 good/final-seed2")
    with pytest.raises(RunError, match=r"2 runs failed: plain/trial3-seed1, good/final-seed2"):
        workshop.run()
    text = workshop.report()
    assert "`plain/trial3-seed1`: train ended with status 1" in text
    assert "````\n$ " in text  # a longer fence than what the program printed
    assert f"| plain | {LR} 0.01 | failed |" in text
    assert "1 of the 3 trials of plain failed: it is tuned by the others alone." in text
    assert "| good | " in text
    assert " | 1 of 2 | 1 | " in text
    (workshop.fake / "fail").unlink()
    assert [call.split()[0] for call in workshop.run()] == ["train", "train", "evaluate"]
    assert "## Failures" not in workshop.report()


def test_an_evaluation_that_fails_hides_behind_no_other(workshop: Workshop) -> None:
    both = [{"data": "builtin:sql[:5]", "name": "five"}, {"data": "builtin:sql[:6]", "name": "six"}]
    workshop.write(settings={LR: 1e-3}, tune={}, seeds=[1], evaluate=both)
    (workshop.fake / "refuse").write_text("--data=builtin:sql[:5]")
    with pytest.raises(RunError, match=r"2 runs failed: plain/final-seed1, good/final-seed1"):
        workshop.run()
    assert "`good/final-seed1`: evaluate five ended with status 2" in workshop.report()
    assert workshop.results()["summaries"]["good"]["exact_match, six"]["mean"] == 1.0
    (workshop.fake / "refuse").unlink()
    assert len(workshop.run()) == 2
    assert workshop.results()["summaries"]["good"]["exact_match, five"]["mean"] == 1.0


def test_a_signal_ends_runs_and_the_next_start_goes_on(workshop: Workshop) -> None:
    (workshop.fake / "wait").write_text("plain/trial2")

    def send() -> None:
        end = time.monotonic() + 30
        while not (workshop.fake / "waiting").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(InterruptedRunError, match=r"interrupted \(SIGTERM\)"):
        workshop.run()
    sender.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "plain/trial2" in workshop.calls[-1]
    record = json.loads(next(workshop.output.glob("runs/plain/trial2-seed1/result.json")).read_text())
    assert record["problem"] == ""  # it is still to be done, so no variant is chosen without it
    (workshop.fake / "wait").unlink()
    # two trials came before it
    assert sorted(call.split()[0] for call in workshop.run()) == ["evaluate"] * 4 + ["train"] * (8 - 2)
    resumed = [call for call in workshop.calls if call.endswith("--resume")]
    assert len(resumed) == 1
    assert "plain/trial2" in resumed[0]
    attempts = next(run for run in workshop.results()["trials"] if run["name"] == "plain/trial2-seed1")["attempts"]
    assert [attempt["status"] for attempt in attempts][:2] == [75, 0]


def test_a_run_that_a_killed_study_has_left_is_waited_for(workshop: Workshop) -> None:
    folder = workshop.output / "runs/plain/trial1-seed1/run"
    held = len(folder_lock._held)
    folder_lock.hold_folder(folder)
    assert folder_lock.holder(folder) == f"process {os.getpid()} on {socket.gethostname()}"
    ended: list[float] = []

    def end() -> None:
        time.sleep(0.7)
        ended.append(time.time())
        folder_lock._held.pop(held).close()

    ending = threading.Thread(target=end)
    ending.start()
    workshop.run(only="plain/trial1*")
    ending.join()
    assert (folder / "metrics.jsonl").stat().st_mtime > ended[0]
    assert folder_lock.holder(folder) is None


def test_a_run_without_a_whole_record_is_begun_again(workshop: Workshop) -> None:
    workshop.run()
    folder = workshop.output / "runs/good/final-seed2"
    (folder / "result.json").write_text('{"digest": "ab')
    assert [call.split()[0] for call in workshop.run()] == ["train", "evaluate"]
    assert folder.with_name("final-seed2.1").is_dir()
    (folder / "run/adapter/manifest.json").unlink()
    (folder / "run/adapter").rename(folder / "run/gone")
    workshop.run(report_only=True)
    assert "Not finished: good/final-seed2." in workshop.report()
    assert [call.split()[0] for call in workshop.run()] == ["train"]


def test_jobs_and_only(workshop: Workshop) -> None:
    (workshop.fake / "meet").write_text("good/trial1 good/trial2")
    assert len(workshop.run(only="good/trial*", jobs=2)) == 3
    assert not (workshop.output / "runs/plain").exists()
    assert "Not finished: plain/trial1-seed1" in workshop.report()
    assert len(workshop.run(only="good")) == 3
    assert {run["variant"] for run in workshop.results()["finals"]} == {"good"}
    assert workshop.run(report_only=True) == []
    with pytest.raises(ValueError, match=r"--only god fits no run\. Did you mean good\?"):
        workshop.run(only="god")


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("3,5,6,7", 4, ["3", "5", "6"]),
        ("GPU-a,GPU-b", 1, ["GPU-a"] * 3),  # what cannot be used ends the list, as in CUDA
    ],
)
def test_runs_at_once_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, expected: list[str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places(3)] == expected


def test_each_program_is_told_its_gpu(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (workshop.fake / "meet").write_text("good/trial1 good/trial2")
    workshop.run(only="good/trial*", jobs=2)
    gpus = {folder: (workshop.fake / folder).read_text() for folder in ("here-trial1-seed1", "here-trial2-seed1")}
    assert set(gpus.values()) == {"0", "1"}


def test_report_only_needs_runs(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match=r"--report-only: there are no runs in .*out"):
        workshop.run(report_only=True)


def test_the_edge_of_a_grid_is_noted(workshop: Workshop) -> None:
    workshop.write(tune={LR: [1e-3, 1e-2]}, seeds=[3])
    workshop.run()
    assert f"The best of good lies at the edge of its grid ({LR} 0.001)" in workshop.report()


def test_children_end_when_their_time_is_over(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    log = tmp_path / "log"

    def send() -> None:
        while "up" not in (log.read_text().splitlines()[1:] if log.exists() else []):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with Children(grace=0.2) as family:
        busy = family.run(
            [sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.3: pass"], tmp_path / "busy"
        )
        assert busy.status == 0
        assert 0.3 <= busy.cpu_seconds < 5
        sender = threading.Thread(target=send)
        sender.start()
        assert family.run([sys.executable, "-S", "-c", stubborn], log).status == -signal.SIGKILL
        sender.join()
        assert (
            family.run([sys.executable, "-c", "raise SystemExit(3)"], log).status == 75
        )  # nothing is started any more
    assert children.GRACE_SECONDS >= 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"unknown setting seed\. Did you mean seeds\?"),
        ({"evaluate": [{"data": "d", "metrics": ["loss"]}]}, r"unknown setting evaluate\.0\.metrics\. Did you mean evaluate\.metric"),
        ({"seeds": []}, r"seeds: list should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds names one twice"),
        ({"reference": "plane"}, r"reference plane is no variant\. Did you mean plain\?"),
        ({"variants": {"a/b": {}}, "reference": []}, r"letters, digits and \. _ \+ -, given 'a/b'"),
        ({"tune": {"god": {LR: [1]}}}, r"tune: god is no variant\. Did you mean good\?"),
        ({"tune": {LR: [1e-3], "good": {LR: [1e-3, 1e-2]}}}, r"same number of trials, or none is tuned fairly: plain 1, good 2"),
        ({"tune": {"good": {LR: [1e-3]}}}, r"same number of trials.*plain 0, good 1"),
        ({"tune": {LR: [1e-3, 1e-3]}}, r"is a list of different values"),
        ({"settings": {"training.seed": 1}}, r"training\.seed is not for a study to set"),
        ({"validation": "builtin:sql"}, r"evaluate and validation are both builtin:sql: rows that tune cannot judge"),
        ({"validation": "builtin:sql[:9]", "settings": {"data.eval": "x"}}, r"data\.eval is what validation says"),
    ],
)  # fmt: skip
def test_what_a_study_may_not_say(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(workshop.write(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"adapter.rnk": 4}}, r"plain/trial1-seed1: unknown setting --adapter\.rnk\. Did you mean adapter\.rank "),
        ({"variants": {"plain": {"method": "lora"}, "good": {"adapter.rank": -1}}}, r"good/trial1-seed1: .*adapter\.rank"),
        ({"tune": {"adapter.sparse_lr": [1, 2]}}, r"tune: adapter\.sparse_lr \(method lora has no sparse part\) changes nothing in"),
        ({"settings": {"data.train": "rows.jsonl"}}, r"tuning needs rows to choose by: give validation"),
    ],
)  # fmt: skip
def test_what_train_would_refuse_is_found_before(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    workshop.write(**changes)
    with pytest.raises(ValueError, match=message):
        workshop.run()
    assert workshop.calls == []


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    with pytest.raises(ValueError, match=r"no such file"):
        read_study(path)
    for text, message in (
        ("{", "Expecting"),
        ("[]", "a JSON object, given list"),
        ('{"name": "a", "name": "b"}', "name stands twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(path)


def test_settings_reach_the_runs_as_they_are(workshop: Workshop) -> None:
    own = {
        "adapter.target_modules": ["q_proj", "v_proj"],
        "ds.train_batch_size": 4,
        "adapter.rank_pattern": {"q": 2},
        "model.revision": None,
    }
    study = read_study(workshop.write(settings=own, tune={}))
    assert plan_trials(study, workshop.output) == []
    run = plan_finals(study, workshop.output, {})[0]
    assert run.settings.adapter.target_modules == ["q_proj", "v_proj"]
    assert run.settings.adapter.rank_pattern == {"q": 2}
    assert run.settings.model.revision is None
    assert run.config["train_batch_size"] == 4
    assert run.settings.training.seed == 1


def test_every_study_is_read(tmp_path: Path) -> None:
    studies = sorted((ROOT / "studies").glob("*.json"))
    assert studies
    for path in studies:
        study = read_study(path)
        assert len(plan_trials(study, tmp_path)) == sum(len(study.choices(name)) for name in study.variants)
