"""The folders of a run's checkpoints, one a step: each complete under its name, or hidden under another."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from rosa_ds.utils.files import manifest_problem, move_aside, sync_files, write_text

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepFolders:
    """The folders ``prefix`` + step of one folder."""

    folder: Path
    prefix: str
    digits: int = 1

    def path(self, step: int) -> Path:
        return self.folder / f"{self.prefix}{step:0{self.digits}d}"

    def partial(self, step: int) -> Path:
        """Where a step's files are written before they are all there."""
        return self._hidden(self.path(step), "partial")

    def step_of(self, path: Path) -> int:
        return int(path.name[len(self.prefix) :])

    def found(self) -> list[Path]:
        """The finished ones, newest first."""
        name = re.compile(rf"{re.escape(self.prefix)}\d+")
        folders = [path for path in self.folder.glob(f"{self.prefix}*") if name.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=self.step_of, reverse=True)

    def complete(self, step: int) -> Path:
        """Give what was written for a step its name; an older folder of the same step goes only then."""
        path, discarded = self.path(step), self._hidden(self.path(step), "discarded")
        if path.exists():
            path.rename(discarded)
        self.partial(step).rename(path)
        sync_files([self.folder])
        if discarded.exists():
            _delete(discarded)
        write_text(self.folder / "latest", path.name + "\n")
        return path

    def prune(self, step: int, keep: int) -> None:
        """Delete all but the ``keep`` newest up to ``step``; one that is half deleted has its name no more."""
        older = [path for path in self.found() if self.step_of(path) < step]
        for path in older[keep - 1 :]:
            _delete(path.rename(self._hidden(path, "discarded")))

    def set_aside_later(self, step: int) -> list[Path]:
        """Rename those of steps that a resumed run will do again, so that they are not taken for its own."""
        return [_abandon(path) for path in self.found() if self.step_of(path) > step]

    def take_back(self) -> None:
        """Between two renames a step that was saved again has no name: give it its own back."""
        for hidden in self.folder.glob(f".{self.prefix}*.discarded"):
            path = hidden.with_name(hidden.name[1:].removesuffix(".discarded"))
            if not path.exists() and manifest_problem(hidden) is None:
                hidden.rename(path)

    def clean(self) -> None:
        """Remove what interrupted savings have left."""
        self.take_back()
        for kind in ("partial", "discarded"):
            for path in self.folder.glob(f".{self.prefix}*.{kind}"):
                _delete(path)

    def newest_good(self, problem: Callable[[Path], str | None] = manifest_problem) -> Path | None:
        """The newest whose files are whole; a damaged one is passed over with a line that says what is wrong with it."""
        self.take_back()
        for path in self.found():
            wrong = problem(path)
            if wrong is None:
                return path
            logger.warning("checkpoint %s is damaged (%s), trying the one before", path, wrong)
        return None

    @staticmethod
    def _hidden(path: Path, kind: str) -> Path:
        return path.with_name(f".{path.name}.{kind}")


def _delete(path: Path) -> None:
    """Delete a folder that nobody needs; that it cannot be is no reason to end a run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error)


def _abandon(path: Path) -> Path:
    target = path.with_name(f"abandoned-{path.name}")
    if target.exists():
        move_aside(target)
    return path.rename(target)
