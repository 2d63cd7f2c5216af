"""Two files that grow while the stages run: one to read and attach to an issue, one for programs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

TEXT, RECORDS = "report.txt", "results.jsonl"


class Report:
    """Both files in a folder. Every record is one write at the end of each, so that a process that is killed spoils none.

    Args:
        begun: ``time.time()`` at the first record; processes of one check share it.
    """

    def __init__(self, folder: Path, begun: float) -> None:
        self.folder, self.begun = folder, begun

    def write(self, stage: str, event: str, fields: dict[str, Any]) -> None:
        """Add a record. ``event``: ``begun``, ``found``, or ``ended``."""
        assert not {"stage", "event", "at_s"} & fields.keys()
        record = {"stage": stage, "event": event, "at_s": round(time.time() - self.begun, 1), **fields}
        _append(self.folder / RECORDS, f"{json.dumps(record)}\n")
        _append(self.folder / TEXT, as_text(record))


def as_text(record: dict[str, Any]) -> str:
    """All of a record, for people: a line, and lists of lines indented below it."""
    own = {name: value for name, value in record.items() if name not in ("stage", "event", "at_s")}
    blocks = {name: value for name, value in own.items() if isinstance(value, list) and value}
    said = ", ".join(f"{name} {_number(value)}" for name, value in own.items() if name not in blocks)
    first = f"[{record['at_s']:6.1f} s] {record['stage']} {record['event']}" + (f": {said}" if said else "") + "\n"
    if record["event"] == "begun":
        first = f"\n{first}"
    return first + "".join(
        f"    {name}:\n" + "".join(f"      {line}\n" for line in lines) for name, lines in blocks.items()
    )


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a check, also of one that still runs or was killed: a last line that is not whole is left out."""
    lines = (folder / RECORDS).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _number(value: Any) -> str:
    if value == []:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
