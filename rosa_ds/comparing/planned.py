"""The runs of a study, each with its resolved settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rosa_ds.comparing.study import Settings, Study, digest_of
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.config.schema import RunConfig
from rosa_ds.config.unused import settings_without_effect
from rosa_ds.training.task import sources


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        label: ``trial2-seed1`` or ``final-seed1``.
        choice: what of the variant's grid this run has.
        folder: of the run in the study's; a final run whose settings are those of a trial has the trial's.
        config: a DeepSpeed JSON file with the section ``rosa``: all of its settings but the output folder.
        settings: ours among them, with their defaults.
        digest: of the settings with their defaults: other ones make another run.
    """

    variant: str
    label: str
    seed: int
    choice: Settings
    folder: Path
    config: dict[str, Any]
    settings: RunConfig
    digest: str

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.label}"


def plan_trials(study: Study, root: Path) -> list[PlannedRun]:
    """The trials of all variants: the first of each, then the second, and so on.

    Raises: ValueError for settings that ``rosa-ds train`` would refuse, or a grid that changes nothing.
    """
    seed, own = study.seed_of_trials, study.tune_settings
    trials = [
        _plan(study, root, variant, f"trial{number}-seed{seed}", seed, own, choice)
        for variant in study.variants
        for number, choice in enumerate(study.choices(variant), start=1)
    ]
    for run in trials:
        if "eval" not in sources(run.settings):
            raise ValueError(f"{run.name}: tuning needs rows to choose by: give validation")
    return sorted(trials, key=lambda run: int(run.label.removeprefix("trial").partition("-")[0]))


def plan_finals(study: Study, root: Path, best: dict[str, PlannedRun | None]) -> list[PlannedRun]:
    """The final runs, all variants of a seed before the next seed.

    Args:
        best: variant -> the trial whose choice it has; ``None``: it was to be tuned and no trial has ended well, so that there
            are no runs of it. A variant that is not there is not tuned.
    """
    runs = []
    for seed in study.seeds:
        for variant in study.variants:
            trial = best.get(variant)
            if variant in best and trial is None:
                continue
            run = _plan(study, root, variant, f"final-seed{seed}", seed, {}, trial.choice if trial else {})
            if trial is not None and trial.digest == run.digest:  # it has been trained already
                run = dataclasses.replace(run, folder=trial.folder)
            runs.append(run)
    return runs


def check_variants(study: Study, root: Path) -> None:
    """Raise ValueError for settings of a final run that ``rosa-ds train`` would refuse, whatever tuning chooses."""
    for variant in study.variants:
        for choice in study.choices(variant) or [{}]:
            _plan(study, root, variant, "final", study.seeds[0], {}, choice)


def _plan(study: Study, root: Path, variant: str, label: str, seed: int, own: Settings, choice: Settings) -> PlannedRun:
    """A run whose settings are the study's, the variant's, its ``own``, the ``choice`` of the grid: the later ones win."""
    given = {} if study.validation is None else {"data.eval": study.validation}
    given |= study.settings | study.variants[variant] | own | choice | {"training.seed": seed}
    arguments = [] if study.config is None else ["--config", study.config]
    try:
        command = parse_command_line([*arguments, *(f"--{name}={_text(value)}" for name, value in given.items())])
    except ValueError as error:
        raise ValueError(f"{variant}/{label}: {error}") from None
    unused = [entry for entry in settings_without_effect(command.config) if entry.split(" ")[0] in choice]
    if unused:
        raise ValueError(
            f"tune: {unused[0]} changes nothing in variant {variant}: give it a grid of its own, tune.{variant}"
        )
    content = {**command.deepspeed, "rosa": command.config.model_dump(mode="json", exclude_unset=True)}
    resolved = command.config.model_dump(mode="json")
    resolved["training"].pop("output_dir")
    digest = digest_of({"deepspeed": command.deepspeed, "rosa": resolved})
    return PlannedRun(variant, label, seed, choice, root / "runs" / variant / label, content, command.config, digest)


def _text(value: Any) -> str:
    """A setting's value as the command line of ``rosa-ds train`` has it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
