"""A file that holds one JSON object, read with one error for all that may be wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises: ValueError if it is none; OSError if the file cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): is it a JSON file, and whole?") from None
    except json.JSONDecodeError as error:
        empty = " (the file is empty)" if not error.doc.strip() else ""
        raise ValueError(f"{path} is not JSON: {error}{empty}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected is a JSON object, given {type(content).__name__}")
    return content
