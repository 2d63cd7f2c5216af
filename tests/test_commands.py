"""``rosa-ds``: which commands there are, and what it says where there is none of that name."""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path

import pytest

from launching import ROOT, run
from rosa_ds import commands
from rosa_ds.commands.dispatch import COMMANDS, dispatch

HELPERS = {"__init__", "dispatch", "program"}


def test_every_command_is_a_module_with_a_main() -> None:
    modules = {path.stem for path in Path(commands.__path__[0]).glob("*.py")}
    assert modules - HELPERS == set(COMMANDS)
    for name in COMMANDS:
        assert callable(importlib.import_module(f"rosa_ds.commands.{name}").main)


def test_help_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["--help"])
    said = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert f"  {name}" in said
        assert line in said


def test_a_command_gets_the_words_behind_its_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rosa_ds"):
        dispatch(["doctor", "--status", "75"])
    assert "exit status 75: it was asked to stop" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "--help"], r"unknown command 'trian'\. Did you mean train\? Give one of init, prepare, train, eval"),
        (["launch"], r"unknown command 'launch'\. Give one of init, prepare, train"),
        ([], r"give a command: one of init, prepare, train, .*; rosa-ds --help says what each does"),
    ],
    ids=["near", "far", "none"],
)
def test_what_is_no_command(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch(arguments)


@pytest.mark.ranks
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_start_commands_as_modules(launcher: str, tmp_path: Path) -> None:
    module = {"torchrun": ("-m", "rosa_ds.commands.doctor"), "deepspeed": ("--module", "rosa_ds.commands.doctor")}
    output = run(launcher, 2, *module[launcher], "--megabytes", "1", cwd=tmp_path)
    assert "all-reduce of 1 MB, gloo:" in output


def test_init_writes_what_the_commands_of_its_readme_name(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "start"
    dispatch(["init", str(folder)])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    named = set(re.findall(r"\b(?:ds_configs|recipes|slurm)/\w+\.\w+", (folder / "README.md").read_text()))
    assert len(named) >= 5
    assert named <= names
    assert {path.name for path in (ROOT / "ds_configs").iterdir()} == {
        path.name for path in (folder / "ds_configs").iterdir()
    }
    assert "slurm/export.sbatch" in names


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dispatch(["init", str(tmp_path / "empty")])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"empty is not empty: give a new folder, or an empty one"):
        dispatch(["init", str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"README\.md is a file: give a new folder"):
        dispatch(["init", str(tmp_path / "empty" / "README.md")])
    assert sorted(tmp_path.rglob("*")) == before
