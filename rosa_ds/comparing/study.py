"""A study: one JSON file that says which variants are compared, how each is tuned, and on which rows they are judged.

Its runs, each with its resolved settings, are planned from it in ``planned.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from rosa_ds.config.schema import Section
from rosa_ds.config.validation import validation_message
from rosa_ds.utils.suggest import did_you_mean, did_you_mean_path

Settings = dict[str, Any]
"""Dotted names of settings of ``rosa-ds train`` (``ds.`` before DeepSpeed's own) and their values."""
RESERVED = {
    "training.output_dir": "compare gives every run its own",
    "training.seed": "give seeds (and tune_seed)",
}


def read_study(path: Path) -> Study:
    """Read a study's file; ``config`` of what is returned is a path from here.

    Raises: ValueError for anything that is wrong with it.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise ValueError(f"study {path}: no such file.{did_you_mean_path(path)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"study {path}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"study {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"study {path}: a study is a JSON object, given {type(content).__name__}")
    names = [*Study.model_fields, *(f"evaluate.{name}" for name in Evaluation.model_fields)]
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise ValueError(validation_message(error, f"study {path}", names)) from None
    if study.config is None:
        return study
    return study.model_copy(update={"config": str(path.parent / study.config)})


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's objects may name a key twice, and Python's reader takes the last."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key} stands twice in one object")
        content[key] = value
    return content


class Evaluation(Section):
    """One call of ``rosa-ds eval`` on every finished run."""

    data: str
    """Rows that no run was trained or tuned on; as its --data."""
    metric: list[str] = Field(default=["exact_match"], min_length=1)
    """As its --metric: one name or several."""
    name: str | None = None
    """How the report calls these rows, where there are several evaluations; by default their data."""
    options: dict[str, str | int | float] = Field(default={})
    """Further options of it, for example {"max-new-tokens": 64}."""

    @field_validator("metric", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def title(self) -> str:
        return self.name or self.data

    def arguments(self) -> list[str]:
        """For ``rosa-ds eval``, without the model and the output."""
        options = [f"--{name}={value}" for name, value in self.options.items()]
        return [f"--data={self.data}", *(f"--metric={name}" for name in self.metric), *options]

    @property
    def digest(self) -> str:
        return digest_of({"arguments": self.arguments()})


class Study(Section):
    """What is compared. Paths in settings are those of ``rosa-ds train``: relative to where ``rosa-ds compare`` is started."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    """Title of the report."""
    config: str | None = None
    """DeepSpeed JSON of all runs, relative to the study's file."""
    settings: Settings = Field(default={})
    """Of all runs."""
    variants: Annotated[dict[str, Settings], Field(min_length=1)]
    """Name of a variant -> its own settings, which win over those of all."""
    validation: str | None = None
    """data.eval of all runs: the rows whose loss chooses among trials."""
    tune: dict[str, list[Any] | dict[str, list[Any]]] = Field(default={})
    """Grid of trials: {setting: values} for all variants, or {variant: {setting: values}} in its place for one. All variants need as many trials."""
    tune_settings: Settings = Field(default={})
    """Of trials alone, for example fewer steps."""
    tune_seed: Annotated[int, Field(ge=0)] | None = None
    """Of all trials; by default the first of seeds."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """One final run of each variant for each."""
    evaluate: list[Evaluation] = Field(default=[])
    """What ``rosa-ds eval`` measures of final runs."""
    reference: list[str] = Field(default=[])
    """Variants that each other one is compared with, seed by seed."""
    layers: list[str] = Field(default=[])
    """Names of layers whose update and mask are drawn; by default three of the middle block."""

    @field_validator("reference", "layers", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_names(self) -> Study:
        for name in self.variants:
            if not re.fullmatch(r"[\w+-][\w.+-]*", name):
                raise ValueError(f"a variant's name is that of a folder: letters, digits and . _ + -, given {name!r}")
        for name in (name for name in self.reference if name not in self.variants):
            raise ValueError(f"reference {name} is no variant.{did_you_mean(name, self.variants)}")
        for what, values in (("seeds", self.seeds), ("evaluate", [entry.title for entry in self.evaluate])):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names one twice: {values}")
        if self.validation is not None and self.validation in [entry.data for entry in self.evaluate]:
            raise ValueError(
                f"evaluate and validation are both {self.validation}: rows that tune cannot judge, give others"
            )
        return self

    @model_validator(mode="after")
    def _check_settings(self) -> Study:
        places = {"settings": self.settings, "tune_settings": self.tune_settings}
        places |= {f"variants.{name}": own for name, own in self.variants.items()}
        places |= {f"tune of {name}": self.grid(name) for name in self.variants}
        for place, settings in places.items():
            for name in settings.keys() & RESERVED.keys():
                raise ValueError(f"{place}: {name} is not for a study to set: {RESERVED[name]}")
            if self.validation is not None and "data.eval" in settings:
                raise ValueError(f"{place}: data.eval is what validation says: give one of them")
        return self

    @model_validator(mode="after")
    def _check_grids(self) -> Study:
        for name, own in self.tune.items():
            if isinstance(own, dict) and name not in self.variants:
                raise ValueError(f"tune: {name} is no variant.{did_you_mean(name, self.variants)}")
        for variant in self.variants:
            for name, values in self.grid(variant).items():
                if not values or any(value in values[:index] for index, value in enumerate(values)):
                    raise ValueError(f"tune: {name} of {variant} is a list of different values, given {values}")
        counts = {name: len(self.choices(name)) for name in self.variants}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"tune: every variant needs the same number of trials, or none is tuned fairly: {shown}")
        return self

    def grid(self, variant: str) -> dict[str, list[Any]]:
        """Setting -> values to try with a variant; empty if it is not tuned."""
        own = self.tune.get(variant)
        if isinstance(own, dict):
            return own
        return {name: values for name, values in self.tune.items() if isinstance(values, list)}

    def choices(self, variant: str) -> list[Settings]:
        """Every combination of a variant's grid; none if it is not tuned."""
        grid = self.grid(variant)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []

    @property
    def seed_of_trials(self) -> int:
        return self.seeds[0] if self.tune_seed is None else self.tune_seed


def digest_of(content: Mapping[str, Any]) -> str:
    """A short name for settings: the same for the same content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
