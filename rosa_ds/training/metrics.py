"""What a run reports: ``metrics.jsonl``, TensorBoard, and memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rosa_ds.utils.files import write_text


class MetricsLog:
    """One JSON object a line, flushed at once; the same numbers go to TensorBoard if wanted.

    Args:
        folder: the run's folder, or ``None`` on ranks that do not write.
        resume_step: lines of later steps are removed, since those steps will be done again.
        evaluation_due: so is the evaluation of that step.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, resume_step: int, evaluation_due: bool = False) -> None:
        self.error: OSError | None = None
        self._stream = None
        self._board: Any = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in kept if _is_kept(line, resume_step, evaluation_due)]
        write_text(path, "".join(line + "\n" for line in lines))
        self._stream = path.open("a", buffering=1)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(
                    "training.tensorboard needs the package tensorboard: pip install 'rosa-ds[tensorboard]'"
                ) from None
            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
            )

    def write(self, **fields: Any) -> None:
        """Add a line; ``step`` is required. Numbers (also inside dictionaries) are drawn by TensorBoard."""
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(_without_nan(fields)) + "\n")
        except OSError as error:
            # the loop tells the other ranks
            self.error = OSError(error.errno, error.strerror, self._stream.name)
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


def _without_nan(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_kept(line: str, resume_step: int, evaluation_due: bool) -> bool:
    """Does a line of an interrupted run stay? A torn one does not."""
    try:
        fields = json.loads(line)
    except ValueError:
        return False
    due = ("draw", "eval") if evaluation_due else ("draw",)  # a checkpoint is written before the draw of its step
    return fields["step"] < resume_step or (fields["step"] == resume_step and fields.get("event") not in due)
