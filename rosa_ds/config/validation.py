"""What pydantic finds wrong with settings, as one message to a user."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from rosa_ds.config.schema import setting_names
from rosa_ds.utils.suggest import did_you_mean


def validation_message(error: ValidationError, source: str, names: Sequence[str] | None = None) -> str:
    """One line for each thing that is wrong: setting, what was given, what is allowed.

    Args:
        names: the settings that there are; by default those of a run.
    """
    lines = []
    allowed = setting_names() if names is None else list(names)
    remedy = "--help lists all settings" if names is None else f"There are {', '.join(names)}"
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {name}.{did_you_mean(name, allowed)} {remedy}")
        elif item["type"] == "value_error":
            lines.append(item["msg"].removeprefix("Value error, ") + (f" ({name})" if name else ""))
        else:
            lines.append(f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, given {item['input']!r}")
    return f"{source}: " + "; ".join(lines)
