"""Every bad input gets one message that helps, the right exit status, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from errors import (
    table_adapters,
    table_data,
    table_environment,
    table_export,
    table_models,
    table_planning,
    table_python,
    table_resume,
    table_settings,
)
from errors.program import Outcome, call
from errors.rows import FunctionRow, Row
from launching import environment

TABLES = (
    *(table_settings, table_data, table_models, table_adapters, table_resume, table_export),
    *(table_planning, table_environment),
)
ROWS: dict[str, Row] = {row.name: row for table in TABLES for row in table.ROWS}
FUNCTIONS: dict[str, FunctionRow] = {row.name: row for row in table_python.ROWS}
BARE = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b")
"""A class of Python where a message should stand."""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder, but for locks and the folder made for one."""
    paths = {path for path in folder.rglob("*") if not path.name.endswith(".lock")}
    only_locks = {
        path.parent for path in folder.rglob("*.lock") if all(p.suffix == ".lock" for p in path.parent.iterdir())
    }
    kept = paths - only_locks
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in kept}


def check(row: Row, outcome: Outcome) -> None:
    assert "Traceback" not in outcome.output, outcome.output
    assert outcome.status == row.status, outcome.output
    assert len(outcome.messages) == 1, outcome.output
    message = outcome.messages[0]
    assert not BARE.match(message), message
    assert len(message) < 1200, message
    missing = [word for word in row.words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_the_tables_are_one_inventory() -> None:
    assert len(ROWS) == sum(len(table.ROWS) for table in TABLES), "two rows have one name"
    assert len(FUNCTIONS) == len(table_python.ROWS)
    assert not ROWS.keys() & FUNCTIONS.keys()
    assert len(ROWS) + len(FUNCTIONS) >= 60
    assert all(row.words for row in [*ROWS.values(), *FUNCTIONS.values()])


@pytest.mark.parametrize("name", ROWS)
def test_programs(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    if row.make is not None:
        row.make(tmp_path)
    before = tree(tmp_path)
    outcome = call(row.program, *row.command(), folder=tmp_path, environ=row.environ, around=row.around)
    check(row, outcome)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, tmp_path: Path) -> None:
    row = FUNCTIONS[name]
    with pytest.raises(ValueError, match=".") as caught:
        row.call(tmp_path)
    message = str(caught.value)
    missing = [word for word in row.words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize(
    "name", ["unknown setting", "weights cut", "export a damaged adapter", "evaluate an unknown metric"]
)
def test_a_process_of_its_own_says_the_same(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    if row.make is not None:
        row.make(tmp_path)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "rosa_ds", row.program, *row.command()]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment() | dict(row.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    alone = Outcome(ended.returncode, ended.stdout)
    check(row, alone)
    assert tree(tmp_path) == before
    inside = call(row.program, *row.command(), folder=tmp_path, environ=row.environ)
    assert (alone.status, alone.messages) == (inside.status, inside.messages)
