"""Damaged checkpoints of every kind: never resumed from, never a traceback without a message."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosa_ds.checkpoints import checkpoint
from test_checkpoint import make

NAMES = [
    "collected-00000.safetensors",
    "manifest.json",
    "moments-00000.safetensors",
    "positions-00000.safetensors",
    "state.json",
    "trained-00000.safetensors",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        checkpoint.save(run, make(step, trained={"layer.A": torch.full((2, 3), float(step))}), keep=2)
    assert sorted(path.name for path in (run / "checkpoints" / "step-000002").iterdir()) == NAMES
    return run


def flip(content: bytes, at: int) -> bytes:
    at %= 8 * len(content)
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


CHANGES: dict[str, Callable[[bytes, int], bytes]] = {
    "flip a bit": flip,
    "truncate": lambda content, at: content[: at % len(content)],
    "empty": lambda content, at: b"",
    "zeros to the end": lambda content, at: content[: at % len(content)].ljust(len(content), b"\0"),
    "append": lambda content, at: content + bytes([at % 256]),
    "drop a byte": lambda content, at: content[: at % len(content)] + content[at % len(content) + 1 :],
    "repeat the beginning": lambda content, at: (content[: 1 + at % len(content)] * len(content))[: len(content)],
}
change = st.tuples(st.sampled_from(NAMES), st.sampled_from([*CHANGES, "delete", "swap"]), st.integers(0, 2**20))


def damage(folder: Path, name: str, kind: str, at: int) -> None:
    path, other = folder / name, folder / NAMES[at % len(NAMES)]
    if kind == "delete":
        path.unlink(missing_ok=True)
    elif kind == "swap" and path.exists() and other.exists():
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif kind in CHANGES and path.exists() and path.stat().st_size:
        path.write_bytes(CHANGES[kind](path.read_bytes(), at))


def contents(folder: Path) -> dict[str, Any]:
    """What is written there; of the manifest what it says, since a space more or less in it is no damage."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with contextlib.suppress(KeyError, ValueError):
        found["manifest.json"] = json.loads(found["manifest.json"])
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(change, min_size=1, max_size=3), both=st.booleans())
def test_no_damage_is_resumed_from(whole: Path, changes: list[tuple[str, str, int]], both: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(shutil.copytree(whole, Path(name) / "run"))
        older, newest = (run / "checkpoints" / f"step-00000{step}" for step in (1, 2))
        before = contents(newest)
        for folder in (newest, older) if both else (newest,):
            for entry in changes:
                damage(folder, *entry)
        if contents(newest) == before:  # changes that undo each other, or a file swapped with itself
            assert checkpoint.find(run, "") == newest
        elif both:
            with pytest.raises(ValueError, match="holds no whole checkpoint"):
                checkpoint.find(run, "")
            # a folder without its state is not taken for a checkpoint that was asked for
            with pytest.raises(ValueError, match="use another checkpoint of the run|holds no"):
                checkpoint.find(run, str(newest))
        else:
            assert checkpoint.find(run, "") == older
            loaded = checkpoint.load(older)
            assert loaded.step == 1
            assert torch.equal(loaded.trained["layer.A"], torch.full((2, 3), 1.0))
