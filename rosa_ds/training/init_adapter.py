"""A run that begins with an adapter that is there already: its numbers, and the settings that they decide."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rosa_ds import distributed
from rosa_ds.adapters.folder import is_adapter, open_adapter
from rosa_ds.adapters.inject import LayerPlan, adapted_layers, plan_layer
from rosa_ds.adapters.mask import check_mask
from rosa_ds.adapters.state import check_fit, trained_parameters
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.adapters.targets import find_targets, match_names
from rosa_ds.checkpoints.checkpoint import Checkpoint, is_checkpoint
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import AdapterConfig, RunConfig, StartedAdapterSettings
from rosa_ds.utils.files import file_hash
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS

logger = logging.getLogger(__name__)
DECIDED = {
    "rank",
    "alpha",
    "density",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "density_pattern",
    "modules_to_save",
}
"""Settings that say what an adapter's numbers mean: those of the folder, where they are not given."""


def begin_from(
    settings: RunConfig, model: nn.Module, base: Mapping[str, Any], saved: Checkpoint | None
) -> tuple[RunConfig, StoredAdapter | None]:
    """What ``adapter.init_from`` makes of the settings, and its numbers. A resumed run has both in its checkpoint.

    Arguments and errors as :func:`open_start` and :func:`adopt`.
    """
    if settings.adapter.init_from is None:
        return settings, None
    if saved is not None and saved.config["adapter"].get("init_from") is not None:
        theirs = {name: value for name, value in saved.config["adapter"].items() if name != "init_from"}
        return adopt(settings, AdapterConfig(method=saved.config["method"], **theirs), model), None
    start = open_start(settings, model, base)
    return adopt(settings, start.description.config, model), start


def check_start(settings: RunConfig, model: nn.Module, start: StoredAdapter) -> None:
    """Raise ValueError unless the numbers fit the adapted model."""
    check_fit(settings.adapter.init_from or "", start.trained, list(start.trained), trained_parameters(model))
    check_mask({name: layer for name, layer in adapted_layers(model).items() if layer.entries}, start.positions)


def open_start(settings: RunConfig, model: nn.Module, base: Mapping[str, Any]) -> StoredAdapter:
    """The adapter of ``adapter.init_from``: a folder of ours or of PEFT, or a run or checkpoint. Collective.

    Args:
        model: the base, also on the meta device.
        base: its name and hash, as :func:`rosa_ds.models.load.identify`; hash ``None``: the name alone is compared.

    Raises: ValueError if there is none that a run can begin with, it belongs to another base, or the ranks see different ones.
    """
    folder = Path(settings.adapter.init_from or "")
    with distributed.together():
        if not folder.is_dir():
            raise ValueError(f"adapter.init_from {folder}: no such folder")
        holds_state = is_checkpoint(folder) or any((folder / part).is_dir() for part in ("adapter", "checkpoints"))
        start = open_source(folder) if holds_state and not is_adapter(folder) else open_adapter(folder, model)
        method, origin = start.description.config.method, start.description.base
        if start.base or start.description.config.parts.everything:
            raise ValueError(
                f"adapter.init_from {folder}: method {method} has changed the base itself: export it merged (rosa-ds export) and "
                "give that folder as model.name_or_path"
            )
        task, labels, wanted = origin.get("task", "causal-lm"), origin.get("labels"), settings.model
        if task != wanted.task:
            raise ValueError(f"adapter.init_from {folder} was trained for task {task}, model.task is {wanted.task}")
        if labels is not None and labels != wanted.labels:
            raise ValueError(
                f"adapter.init_from {folder} tells apart the classes {', '.join(labels)}, this run {', '.join(wanted.labels)}: give "
                f"--model.labels '{json.dumps(labels)}'"
            )
        known = None not in (origin.get("hash"), base["hash"])
        if known and origin["hash"] != base["hash"]:
            raise ValueError(f"adapter.init_from {folder} was trained on other weights than {base['name_or_path']} has")
        if not known and origin.get("name_or_path") not in (None, base["name_or_path"]):
            logger.warning(
                "%s names its base %s, this run's is %s",
                folder,
                origin["name_or_path"],
                base["name_or_path"],
                extra=SAME_ON_ALL_RANKS,
            )
    digest = "".join(file_hash(path) for path in sorted(start.folder.glob("*.safetensors")))
    if not distributed.same_everywhere(digest.encode()):
        raise ValueError(f"the ranks see different adapters in {folder}: give a folder that all hosts share")
    return start


def adopt(settings: RunConfig, found: AdapterConfig, model: nn.Module) -> RunConfig:
    """The settings of a run that begins with an adapter of these: taken from it, or given and the same.

    Raises: ValueError for a given setting that makes another adapter, with what it is there.
    """
    folder = settings.adapter.init_from
    if "method" in settings.model_fields_set and settings.method != found.method:
        raise ValueError(
            f"adapter.init_from {folder} holds method {found.method}, given is {settings.method}: give --method {found.method}"
        )
    own = settings.adapter.model_dump()
    given = settings.adapter.model_fields_set & DECIDED
    theirs = found.model_dump(include=DECIDED | ({"dropout"} - settings.adapter.model_fields_set))
    adapter = StartedAdapterSettings(**{**own, **{name: value for name, value in theirs.items() if name not in given}})
    merged = settings.model_copy(update={"method": found.method, "adapter": adapter})
    if given:
        _check_same(merged.adapter_config(), found, model, f"adapter.init_from {folder}", given)
    return merged


def _check_same(ours: AdapterConfig, theirs: AdapterConfig, model: nn.Module, where: str, given: set[str]) -> None:
    """Raise ValueError unless both settings make the same adapter of a model."""
    names = ", ".join(f"adapter.{name}" for name in sorted(given))
    remedy = f"leave out what differs ({names} given): it is then taken from the folder"
    mine, wanted = (find_targets(model, config.target_modules) for config in (ours, theirs))
    if wrong := sorted(mine.keys() ^ wanted.keys()):
        raise ValueError(f"{where} {'adapts' if wrong[0] in wanted else 'does not adapt'} {wrong[0]}: {remedy}")
    modules = [name for name, _ in model.named_modules() if name]
    here, there = (set(match_names(c.modules_to_save, modules, "adapter.modules_to_save")) for c in (ours, theirs))
    if differing := [name for name in modules if (name in here) != (name in there)]:
        name = differing[0]
        raise ValueError(f"{where} {'has' if name in there else 'does not have'} {name} trained whole: {remedy}")
    for name, layer in wanted.items():
        if problem := _difference(plan_layer(name, layer, ours), plan_layer(name, layer, theirs)):
            raise ValueError(f"{where}: {name} has {problem} given: {remedy}")


def _difference(here: LayerPlan, there: LayerPlan) -> str:
    if here.rank != there.rank:
        return f"rank {there.rank}, {here.rank} is"
    if here.entries != there.entries:
        return f"{there.entries:,} sparse entries, {here.entries:,} are"
    if not math.isclose(here.scale, there.scale, rel_tol=1e-9):
        return f"alpha {there.scale * there.rank:g}, {here.scale * here.rank:g} is"
    return ""
