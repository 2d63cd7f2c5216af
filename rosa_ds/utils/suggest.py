"""Error texts that name the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """``" Did you mean a or b?"`` (with the leading blank), best first, or nothing where no name resembles ``given``.

    A name whose last dotted part equals that of ``given`` counts as near, so ``rank`` finds ``adapter.rank``.
    """
    allowed = sorted(set(allowed))
    tail = given.rsplit(".", 1)[-1]
    same_tail = [name for name in allowed if name.rsplit(".", 1)[-1] == tail]
    close = difflib.get_close_matches(given, allowed, cutoff=0.75)
    by_tail = {name.rsplit(".", 1)[-1]: name for name in allowed}
    close_tails = [by_tail[part] for part in difflib.get_close_matches(tail, by_tail, cutoff=0.75)]
    nearest = list(dict.fromkeys(same_tail + close + close_tails))[:3]
    # a blank at the end of a name (a table's column) would not be seen
    names = [name if name == name.strip() else repr(name) for name in nearest]
    return f" Did you mean {' or '.join(names)}?" if names else ""


def did_you_mean_path(path: Path) -> str:
    """As :func:`did_you_mean`, with the files and folders that stand where ``path`` should."""
    siblings = {entry.name: str(entry) for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    names = difflib.get_close_matches(path.name, siblings)
    return f" Did you mean {' or '.join(siblings[name] for name in names)}?" if names else ""
