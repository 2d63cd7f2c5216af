"""From a command line to a run: a DeepSpeed JSON file, its section ``"rosa"``, and overrides.

``rosa-ds train --config FILE [--dotted.name value ...] [--ds.dotted.name value ...] [--resume [CHECKPOINT]]``
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from rosa_ds.config.schema import RunConfig, setting_names, setting_types
from rosa_ds.config.validation import validation_message
from rosa_ds.utils.json_files import read_json
from rosa_ds.utils.suggest import did_you_mean, did_you_mean_path

USAGE = """\
--config FILE         any DeepSpeed JSON file; its section "rosa" holds the settings below
--resume [PATH]       continue from the last complete checkpoint of training.output_dir, or from PATH
--dry-run             say what would be done and held, and end: no weights are read, no GPU is used
--gpus N              with --dry-run: ranks to plan for (default: WORLD_SIZE)
--ds.NAME value       override any setting of the DeepSpeed file, e.g. --ds.zero_optimization.stage 1
--NAME value          override a setting of ours:
"""


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What a user asked for. ``resume`` is ``None`` (new run), ``""`` (last checkpoint) or a path."""

    config: RunConfig
    deepspeed: dict[str, Any]
    resume: str | None
    dry_run: bool = False
    gpus: int | None = None


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Read the arguments of ``rosa-ds train``.

    Raises:
        ValueError: anything that is wrong with it, in one message.
        SystemExit: after ``--help`` was printed.
    """
    split = _split(arguments)
    if split.help:
        print(USAGE, flush=True)
        build_config({}, ["--help"])
    deepspeed = _read_json(split.config) if split.config else {}
    section = deepspeed.pop("rosa", {})
    if not isinstance(section, dict):
        raise ValueError(f'--config {split.config}: the section "rosa" is a JSON object, given {section!r}')
    for dotted, text in split.deepspeed.items():
        if dotted.split(".")[0] == "rosa":
            raise ValueError(f"--ds.{dotted}: our own settings are given without it: --{dotted.removeprefix('rosa.')}")
        _override(deepspeed, f"--ds.{dotted}", dotted, _as_json(text))
    source = (
        f"--config {split.config}{' and the command line' if split.ours or split.lists else ''}"
        if section
        else "settings"
    )
    for dotted, items in split.lists.items():
        _override(section, f"--{dotted}", dotted, items)
    config = build_config(section, split.ours, source)
    if split.gpus is not None:
        if not split.dry_run:
            raise ValueError("--gpus plans with --dry-run alone: the launcher decides how many ranks a run has")
        if not split.gpus.isdigit() or int(split.gpus) < 1:
            raise ValueError(f"--gpus is a whole number of 1 or more, given {split.gpus!r}")
    gpus = None if split.gpus is None else int(split.gpus)
    return CommandLine(config, deepspeed, split.resume, split.dry_run, gpus)


@dataclasses.dataclass
class _SplitArguments:
    config: str | None = None
    resume: str | None = None
    help: bool = False
    dry_run: bool = False
    gpus: str | None = None
    deepspeed: dict[str, str] = dataclasses.field(default_factory=dict)
    ours: list[str] = dataclasses.field(default_factory=list)
    lists: dict[str, Any] = dataclasses.field(default_factory=dict)

    def take(self, name: str, text: str) -> None:
        """A setting of ours."""
        kind = setting_types().get(name)
        if kind == list[str]:
            self.lists[name] = read_list(f"--{name}", text)
        elif any(get_origin(choice) is list for choice in get_args(kind)):
            # a text or a list, which is JSON; pydantic-settings would collect what is given twice
            self.lists[name] = None if text == "none" and type(None) in get_args(kind) else text
        else:
            self.ours += _as_arguments(f"--{name}", text)


def _split(arguments: Sequence[str]) -> _SplitArguments:
    """Sort the command line into the launcher's, DeepSpeed's and our arguments; unknown names are errors."""
    split = _SplitArguments()
    known = setting_names() + list(RunConfig.model_fields)
    position = 0

    def value_of(flag: str, inline: str | None) -> str:
        nonlocal position
        if inline is not None:
            return inline
        if position >= len(arguments) or _is_flag(arguments[position]):
            raise ValueError(f"{flag} needs a value: {flag} VALUE")
        position += 1
        return arguments[position - 1]

    while position < len(arguments):
        argument = arguments[position]
        position += 1
        flag, has_inline, inline_text = argument.partition("=")
        inline = inline_text if has_inline else None
        name = flag[2:]
        if argument in ("-h", "--help"):
            split.help = True
        elif not _is_flag(argument):
            raise ValueError(f"unexpected argument {argument!r}: settings are given as --name value")
        elif name in ("local_rank", "local-rank"):
            value_of(flag, inline)  # the deepspeed launcher puts it first; the environment says the same
        elif name == "config":
            split.config = value_of(flag, inline)
        elif name == "resume":
            follows = position < len(arguments) and not _is_flag(arguments[position])
            split.resume = value_of(flag, inline) if follows or inline is not None else ""
        elif name == "dry-run" and inline is None:
            split.dry_run = True
        elif name == "gpus":
            split.gpus = value_of(flag, inline)
        elif name.startswith("ds."):
            split.deepspeed[name[3:]] = value_of(flag, inline)
        elif name in known:
            split.take(name, value_of(flag, inline))
        else:
            allowed = [*known, "config", "resume", "dry-run", "help"]
            raise ValueError(f"unknown setting --{name}.{did_you_mean(name, allowed)} --help lists all settings")
    return split


def _as_arguments(flag: str, value: str) -> list[str]:
    """As pydantic-settings takes them: it cuts ``flag=value`` at the first line's end, and argparse takes a lone -1 for a flag."""
    if value.startswith("-") and "\n" in value:
        raise ValueError(
            f'{flag}: a text that begins with - and has a line break goes into the section "rosa" of --config'
        )
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _is_flag(argument: str) -> bool:
    return argument.startswith("--")


def _read_json(path: str) -> dict[str, Any]:
    try:
        return read_json(Path(path))
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file.{did_you_mean_path(Path(path))}") from None
    except IsADirectoryError:
        raise ValueError(f"--config {path} is a folder: give a DeepSpeed JSON file") from None
    except ValueError as error:
        raise ValueError(f"--config {error}: give a DeepSpeed JSON file") from None


def _override(config: dict[str, Any], flag: str, dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries."""
    *sections, last = dotted.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise ValueError(f"{flag}: {section} is not a section of --config's file but {config!r}")
    config[last] = value


def _as_json(text: str) -> Any:
    """What a text says in JSON, or itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_list(flag: str, text: str) -> list[Any]:
    """A list from a command line: JSON, or names and expressions with commas between them.

    A comma inside brackets, as in ``[0-9]{1,2}``, is the expression's.

    Raises: ValueError for JSON that is not whole, or no list.
    """
    text = text.strip()
    try:
        found: Any = json.loads(text)
        if isinstance(found, list):
            return found
    except json.JSONDecodeError as error:
        if text.startswith("[") and '"' in text:
            twice = "; in JSON a backslash is written twice" if "escape" in error.msg else ""
            raise ValueError(
                f"{flag} {text} is no JSON list: {error.msg} at character {error.pos + 1}{twice}"
            ) from None
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def build_config(section: Mapping[str, Any], arguments: Sequence[str] = (), source: str = "settings") -> RunConfig:
    """The validated configuration of a section ``"rosa"`` and ``--name value`` overrides.

    Raises:
        ValueError: an unknown setting (with the nearest name), a wrong value or a wrong combination.
    """
    try:
        read: Any = _CliConfig  # pydantic-settings takes further arguments than its fields
        parsed = read(
            _cli_parse_args=list(arguments), _cli_exit_on_error=False, _cli_prog_name="rosa-ds train", **section
        )
    except ValidationError as error:
        raise ValueError(validation_message(error, source)) from None
    except SettingsError as error:
        raise ValueError(f"{source}: {error}") from None
    return RunConfig.model_validate(parsed.model_dump(exclude_unset=True))


class _CliConfig(RunConfig, BaseSettings):
    """:class:`RunConfig` read from keyword arguments and a command line; never from the environment."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, cli_parse_none_str="none", cli_use_class_docs_for_groups=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)
