"""What a run reports: ``metrics.jsonl``, TensorBoard, and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rosa_ds.files import write_text


class MetricsLog:
    """One JSON object a line, flushed at once; the same numbers go to TensorBoard if wanted.

    Args:
        folder: the run's folder, or ``None`` on ranks that do not write.
        resume_step: lines of later steps are removed, since those steps will be done again.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, resume_step: int) -> None:
        self._stream = None
        self._board: Any = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines() if path.exists() and resume_step else []
        lines = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= resume_step]
        write_text(path, "".join(line + "\n" for line in lines))
        self._stream = path.open("a", buffering=1)
        if tensorboard:
            self._board = _open_tensorboard(folder, resume_step)

    def write(self, **fields: Any) -> None:
        """Add a line; ``step`` is required. Numbers (also inside dictionaries) are drawn by TensorBoard."""
        if self._stream is None:
            return
        self._stream.write(json.dumps(fields) + "\n")
        if self._board is not None:
            group = fields.get("event", "train")
            for name, value in fields.items():
                values = value if isinstance(value, dict) else {"": value}
                for part, number in values.items():
                    if isinstance(number, (int, float)) and name not in ("step", "epoch"):
                        self._board.add_scalar("/".join(filter(None, (group, name, part))), number, fields["step"])

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()


def _open_tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "training.tensorboard needs the package tensorboard: pip install 'rosa-ds[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
