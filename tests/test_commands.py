"""``rosa-ds``: which commands there are, and what it says where there is none of that name."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest

from launching import run
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
        (["trian", "--help"], r"unknown command 'trian'\. Did you mean train\? Give one of train, eval"),
        (["launch"], r"unknown command 'launch'\. Give one of train"),
        ([], r"give a command: one of train, .*; rosa-ds --help says what each does"),
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
