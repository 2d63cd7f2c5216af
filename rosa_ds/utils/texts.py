"""What texts have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def shared_length(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def summary(names: Iterable[str]) -> str:
    """Names of modules with their numbers left out, each with how many there are: ``3 × layers.*.mixer.dt_proj``."""
    counts = Counter(kind_of(name) for name in names)
    shown = [f"{count} × {kind}" for kind, count in counts.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} kinds more" if len(shown) > 8 else "")


def kind_of(name: str) -> str:
    """The name of a module as those of its kind have it: ``layers.*.mlp``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
