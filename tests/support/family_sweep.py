"""What holds for a family of models: gradients, merge, export, causality, stage 3's reader, padding, packing, generation.

``python tests/support/family_sweep.py --table docs/families.md`` looks at every family, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

import rosa_ds
from family_shapes import TASKS, Family, NotBuiltError, build, families, one_line, token_ids
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.reach import unreached, uses
from rosa_ds.config.command_line import build_config
from rosa_ds.config.schema import ModelSettings
from rosa_ds.data.batches import BatchPlan, Part, collate, pack
from rosa_ds.data.tokenise import Tokens
from rosa_ds.evaluation.generate import Generation, continuations
from rosa_ds.models.attention import makes_mask
from rosa_ds.models.load import load_model
from rosa_ds.models.loss import batch_logits
from rosa_ds.models.stream import NotStreamableError, allocate, stream_base
from rosa_ds.models.task import auto_class
from rosa_ds.training.packing import settle_batches
from rosa_ds.training.reach import look_at_base, probe, settle_targets

State = Literal["right", "refused", "transformers", "wrong", "not built"]
LABELS = ["no", "yes"]
EXACT, ROUNDED = 1e-5, 2e-3
"""Relative to the largest number: norms and rotations compute in float32 in a float64 model; float32 models by themselves."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a check found. ``refused``: by us, before work; ``transformers``: without us it is so, too."""

    state: State
    why: str = ""


class RefusedError(Exception):
    """Our own line for what is not done."""


class TransformersError(Exception):
    """What plain transformers does, too."""


class Subject:
    """A small model of a family, and what is made of it."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.small, self.config = build(family)
        self._targets: list[str] | None = None
        self.plain = copy.deepcopy(self.small).double()
        self.exact = EXACT
        try:
            known = bool(self.logits(self.plain).isfinite().all())
        except Exception:  # a family that has float32 in its code
            known = False
        if not known:  # or masks with the least float64, of which float32 or a sum makes an infinity
            self.plain, self.exact = copy.deepcopy(self.small), ROUNDED

    @property
    def causal(self) -> bool:
        return self.family.task == "causal-lm"

    def ids(self, length: int = 9, rows: int = 2) -> Tensor:
        return token_ids(self.config, length, rows)

    def logits(self, model: nn.Module, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        ids = self.ids() if ids is None else ids
        more: dict[str, Any] = {"use_cache": False} if self.causal else {}
        with torch.no_grad():
            found: Tensor = model(
                input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **more
            ).logits
        return found

    def total(self, model: nn.Module) -> Tensor:
        """Of all logits, with gradients."""
        ids = self.ids()
        more: dict[str, Any] = {"use_cache": False} if self.causal else {}
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.sum()
        return found

    def reloaded(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Raises: TransformersError where transformers cannot read what it has written of the plain model either."""
        loads = auto_class(self.family.task).from_pretrained
        try:
            found: PreTrainedModel = loads(folder, dtype=dtype).eval()
        except Exception:
            self.plain.save_pretrained(self.folder / "plain")
            try:
                loads(self.folder / "plain", dtype=dtype)
            except Exception as error:
                raise TransformersError(f"it cannot read what it has saved: {one_line(error)}") from error
            raise
        return found

    def read_back(self, model: PreTrainedModel, name: str) -> Tensor:
        """Logits of a model that is saved and loaded by transformers."""
        model.save_pretrained(self.folder / name)
        return self.logits(self.reloaded(self.folder / name, model.dtype))

    def targets(self) -> list[str]:
        """``adapter.target_modules`` as a run settles them."""
        if self._targets is None:
            model = {"task": self.family.task} | ({} if self.causal else {"labels": LABELS})
            try:
                settings = build_config({"method": "lora", "model": model, "data": {"max_length": 64}})
                unused = look_at_base(settings, self.config)
                settings = settle_targets(settings, self.plain, unused)
            except ValueError as error:
                raise RefusedError(one_line(error)) from error
            self._targets = settings.adapter.target_modules
        return self._targets

    def adapted(self, method: str) -> PreTrainedModel:
        """The model with adapters as a run chooses their layers, all of whose numbers are drawn."""
        model = copy.deepcopy(self.plain)
        adapter = {"rank": 2, "density": 0.05, "dropout": 0.0, "target_modules": self.targets()}
        try:
            rosa_ds.inject(model, build_config({"method": method, "adapter": adapter}).adapter_config())
        except ValueError as error:
            raise RefusedError(one_line(error)) from error
        draw = torch.Generator().manual_seed(3)
        layers = adapted_layers(model)
        sparse = {name: layer for name, layer in layers.items() if layer.entries}
        positions = {
            layer.weight_name: torch.randperm(layer.weight_numel, generator=draw)[: layer.entries].sort().values.int()
            for layer in sparse.values()
        }
        if sparse:
            rosa_ds.set_mask(model, positions)
        for layer in layers.values():
            for part in (layer.A, layer.B, layer.values):
                if part is not None:
                    part.data = (torch.randn(part.shape, generator=draw) * 0.1).to(layer.weight.dtype)
        return model


def differ(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError unless two tensors are equal, relative to the largest number."""
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    off = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    assert off <= tolerance, f"{what} off by {off:.2g}"


def check_gradients(subject: Subject) -> str:
    """The adapters' gradients are those of ``W + scale B A + S`` as dense autograd has them, and not zero unless the start says so."""
    told: set[str] = set()
    for method in ("lora", "robust"):
        model = subject.adapted(method)
        leaves: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, layer in adapted_layers(model).items():
            assert layer.A is not None
            assert layer.B is not None
            parts = {"A": layer.A, "B": layer.B} | ({} if layer.values is None else {"values": layer.values})
            own = {part: tensor.detach().clone().requires_grad_() for part, tensor in parts.items()}
            leaves |= {f"{name}.{part}": tensor for part, tensor in own.items()}
            low_rank = layer.scale * own["B"] @ own["A"]
            weight = layer.weight.detach() + (low_rank.T if layer.transposed else low_rank)
            if layer.positions is not None:
                flat = torch.zeros(weight.numel(), dtype=weight.dtype)
                weight = weight + flat.index_add(0, layer.positions.long(), own["values"]).view_as(weight)
            weights[f"{name}.weight"] = weight
        ids = subject.ids()
        more = {"attention_mask": torch.ones_like(ids)} | ({"use_cache": False} if subject.causal else {})
        found, expected = (
            model(input_ids=ids, **more).logits,
            torch.func.functional_call(copy.deepcopy(subject.plain), weights, kwargs={"input_ids": ids, **more}).logits,
        )
        differ(found.detach(), expected.detach(), subject.exact, f"{method}: logits")
        toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(5)).to(found.dtype)
        (found * toward).sum().backward()
        (expected * toward).sum().backward()
        trained = dict(model.named_parameters())
        largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
        dead = set()
        for name, leaf in leaves.items():
            ours = trained[name].grad
            ours, dense = (torch.zeros_like(leaf) if grad is None else grad for grad in (ours, leaf.grad))
            off = float((ours - dense).abs().max()) / largest
            assert off <= subject.exact, f"{method}: the gradient of {name} is off by {off:.2g}"
            if not dense.any() and "expert" not in name:
                dead.add(name.rpartition(".")[0])
        if dead:
            told |= dead
            start = uses(model, adapted_layers(model), functools.partial(subject.total, model), numbers=True)
            assert dead <= set(unreached(start)), (
                f"{method}: no gradient reaches {min(dead)}, which the start does not tell"
            )
    return f"no gradient reaches {len(told)} layers, which the start tells" if told else ""


def check_merge(subject: Subject) -> None:
    """The merged model says what the adapted one says."""
    model = subject.adapted("robust")
    before = subject.logits(model)
    rosa_ds.merge(model)
    differ(subject.logits(model), before, max(subject.exact, EXACT), "logits")


def check_export(subject: Subject) -> None:
    """The merged model, saved and loaded by transformers, says the same."""
    model = subject.adapted("robust")
    rosa_ds.merge(model)
    try:
        differ(subject.read_back(model, "merged"), subject.logits(model), subject.exact, "logits")
    except TransformersError:
        raise
    except Exception:
        plain = subject.logits(subject.plain)
        try:
            differ(subject.read_back(subject.plain, "plain"), plain, subject.exact, "logits")
        except Exception as error:
            raise TransformersError(f"without an adapter, too, it is not what was saved: {one_line(error)}") from error
        raise


def check_causal(subject: Subject) -> None:
    """A language model that sees the future is refused before the first step, and no other one is."""
    ids = subject.ids(16, 1)
    other = ids.clone()
    other[0, -1] = 1 + ids[0, -1]
    merged = rosa_ds.merge(subject.adapted("lora"))
    one, two = (subject.logits(merged, rows)[:, :-1] for rows in (ids, other))
    sees = not torch.allclose(one, two, rtol=0, atol=1e-4 * float(one.std()))
    tokens = Tokens([*ids[0].tolist()] * 2, [True] * 32)
    data: Any = SimpleNamespace(lengths=np.array([32]), sequence=lambda _: tokens)
    model = subject.adapted("lora")
    refusal = None
    try:
        probe(model, model, data, 0, traced=True)
    except ValueError as error:
        refusal = error
    if refusal is not None:
        assert sees, f"refused, and does not see the future: {refusal}"
        raise RefusedError(one_line(refusal)) from refusal
    assert not sees, "sees the future, and is not refused"


def check_reader(subject: Subject) -> str:
    """Stage 3's reader gives parameters, buffers and logits of the loading of stages 0 to 2, in three types."""
    folder = subject.folder / "base"
    subject.small.save_pretrained(folder, save_original_format=False)
    settings = ModelSettings(
        name_or_path=str(folder), task=subject.family.task, labels=[] if subject.causal else LABELS
    )
    saves = dict(subject.small.named_parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        subject.reloaded(folder, dtype)
        try:
            expected = load_model(settings, dtype)
        except ValueError as error:
            raise RefusedError(one_line(error)) from error
        try:
            model, base = stream_base(settings, dtype)
        except NotStreamableError as error:
            return f"read whole on every rank: {one_line(error)}"
        allocate(model, base.fill, torch.device("cpu"))
        base.close()
        for kind in ("parameters", "buffers"):
            ours, theirs = (dict(getattr(m, f"named_{kind}")()) for m in (model, expected))
            assert ours.keys() == theirs.keys(), f"{dtype}: {kind} {sorted(ours.keys() ^ theirs.keys())[:2]}"
            for name, tensor in ours.items():
                other = theirs[name]
                if kind == "parameters":  # DeepSpeed's engine casts those that transformers keeps in float32
                    tensor, other = tensor.to(dtype), other.to(dtype)
                assert tensor.dtype == other.dtype, f"{name} is {tensor.dtype}, not {other.dtype}"
                if not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
                    saved = saves.get(name)
                    if saved is not None and torch.equal(tensor, saved.to(dtype)):
                        raise TransformersError(f"from_pretrained gives {name} other numbers than its file has")
                    raise AssertionError(f"{dtype}: {name} differs")
        try:
            logits = subject.logits(expected)
        except Exception as error:
            raise TransformersError(f"no forward pass in {dtype}: {one_line(error)}") from error
        if not any(parameter.dtype != dtype for parameter in expected.parameters()):
            differ(subject.logits(model).float(), logits.float(), 1e-6, f"{dtype}: logits")
    return ""


def check_padding(subject: Subject) -> None:
    """Padding on the right does not change what is said of real tokens."""

    def off(model: nn.Module) -> float:
        ids = subject.ids()
        alone = subject.logits(model, ids)
        longer = nn.functional.pad(ids, (0, 5), value=0)
        padded = subject.logits(model, longer, (torch.arange(14) < 9).long().expand(2, -1))
        padded = padded[:, :9] if subject.causal else padded
        return float((padded - alone).abs().max() / alone.abs().max())

    if (found := off(subject.adapted("robust"))) > (tolerance := 10 * subject.exact):
        if (theirs := max(off(subject.plain), off(rosa_ds.merge(subject.adapted("robust"))))) > tolerance:
            raise TransformersError(f"logits off by {theirs:.2g} without an adapter, too")
        raise AssertionError(f"logits off by {found:.2g}")


def check_packing(subject: Subject) -> str:
    """Sequences one behind the other have the logits that each has alone, or the test at a run's start pads them."""
    sequences = [Tokens(subject.ids(length, 1)[0].tolist(), [True] * length) for length in (9, 14, 5)]
    data: Any = SimpleNamespace(lengths=np.array([9, 14, 5]), sequence=lambda number: sequences[number])
    model = subject.adapted("robust")
    batches = BatchPlan(data.lengths, np.arange(4), (Part("rows", 0, 3, 3),), 3, 3, 1, seed=0, batching="tokens")
    if not settle_batches(batches, model, data, "tokens").packed:
        return "padded"
    cpu = torch.device("cpu")
    with torch.no_grad():
        packed = batch_logits(model, pack(sequences), cpu)[0]
        alone = torch.cat([batch_logits(model, collate([tokens], 0), cpu)[0] for tokens in sequences])
    differ(packed, alone, subject.exact, "logits")
    return "with a mask" if makes_mask(model.config) else ""


def check_generation(subject: Subject) -> None:
    """Rows that are padded on the left in a batch go on as they do alone, greedily."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, chat_template=None)
    prompts = [subject.ids(length, 1)[0].tolist() for length in (5, 9)]

    def ours(model: PreTrainedModel, batch_size: int) -> list[list[int]]:
        return continuations(model, tokenizer, prompts, Generation(batch_size=batch_size, max_new_tokens=6))

    def theirs(rows: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        how = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        subject.plain.generation_config = GenerationConfig()
        with torch.no_grad():
            return subject.plain.generate(ids, attention_mask=mask, generation_config=how)[:, longest:].tolist()

    try:
        alone, together = ours(subject.plain, 1), ours(subject.plain, 2)
    except Exception as error:
        try:
            theirs(prompts)
        except Exception as plain:
            raise TransformersError(one_line(plain)) from plain
        raise AssertionError(one_line(error)) from error
    if alone != together:
        if [theirs([row])[0] for row in prompts] != theirs(prompts):
            raise TransformersError("a batch padded on the left goes on in another way than its rows alone")
        raise AssertionError("a batch goes on in another way than its rows alone")


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "gradients": check_gradients,
    "merge": check_merge,
    "export": check_export,
    "causal": check_causal,
    "stage 3": check_reader,
    "padding": check_padding,
    "packing": check_packing,
    "generation": check_generation,
}
OF_LANGUAGE_MODELS = ("causal", "packing", "generation")


def sweep(family: Family) -> dict[str, Outcome]:
    """What each check finds of a family; ``{"built": ...}`` alone for one that is not built."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            subject = Subject(family, Path(folder))
        except NotBuiltError as error:
            return {"built": Outcome("not built", str(error))}
        checks = {name: check for name, check in CHECKS.items() if subject.causal or name not in OF_LANGUAGE_MODELS}
        return {name: _outcome(check, subject) for name, check in checks.items()}


def _outcome(check: Callable[[Subject], str | None], subject: Subject) -> Outcome:
    try:
        return Outcome("right", check(subject) or "")
    except RefusedError as error:
        return Outcome("refused", str(error))
    except TransformersError as error:
        return Outcome("transformers", str(error))
    except AssertionError as error:
        return Outcome("wrong", " ".join(str(error).split())[:200] or "an assertion")
    except Exception as error:  # a traceback is no refusal
        return Outcome("wrong", one_line(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what models of random sizes make transformers say."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(before)


def sweep_apart(family: Family, seconds: float) -> dict[str, Outcome]:
    """:func:`sweep` in a process of its own, which ends after some seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(sweep(family)))
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"built": Outcome("not built", f"not done in {seconds:.0f} s")}
        found: dict[str, Outcome] = receiver.recv()
        return found
    except EOFError:
        return {"built": Outcome("wrong", "its process died")}
    finally:
        child.kill()
        child.join()


def row(outcomes: dict[str, Outcome], seconds: float) -> list[str]:
    """A family's cells in the table, without its name: a state for each check, seconds, and why."""
    built = outcomes["built"].state if "built" in outcomes else "-"
    states = [outcomes[name].state if name in outcomes else built for name in CHECKS]
    reasons = dict.fromkeys(f"{name}: {o.why}" for name, o in outcomes.items() if o.why)
    return [*states, f"{seconds:.0f}", "; ".join(reasons).replace("|", "/")]


def rows_of(table: str) -> dict[Family, list[str]]:
    """The rows of an earlier table."""
    found = {}
    task: Any = ""
    for line in table.splitlines():
        if line.startswith("## "):
            task = line[3:]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == len(CHECKS) + 3 and cells[0] != "family" and not cells[0].startswith("-"):
            found[Family(task, cells[0])] = cells[1:]
    return found


def table(rows: dict[Family, list[str]], wanted: int) -> str:
    """The documentation's table of families, in Markdown."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    timed = [float(cells[len(CHECKS)]) for cells in rows.values() if cells[len(CHECKS)] != "-"]
    lines = [
        "# Families of models",
        "",
        f"Made by `python tests/support/family_sweep.py --table docs/families.md` with {versions}.",
        f"{len(timed)} rows took {sum(timed) / 60:.1f} minutes on a shared machine; the others are of an earlier sweep.",
        "Families of the installed transformers are built small, with random weights, and looked at on the CPU.",
        f"Looked at are {len(rows)} of {wanted}: {_counts(rows)}.",
        "",
        "`right`: it holds. `refused`: one line says so before work is done. `transformers`: plain transformers does so, too.",
        "`wrong`: a defect. `not built`: there is no small model of it here, and nothing is known. A family counts as the first of",
        f"{', '.join(_ORDER)} that its row has.",
        "",
        *(f"- **{name}**: {' '.join((check.__doc__ or '').split())}" for name, check in CHECKS.items()),
        "",
    ]
    for task in TASKS:
        mine = {family: cells for family, cells in rows.items() if family.task == task}
        if not mine:
            continue
        lines += [f"## {task}", "", f"{_counts(mine)}.", ""]
        lines += ["| family | " + " | ".join(CHECKS) + " | seconds | why |", "|---" * (len(CHECKS) + 3) + "|"]
        lines += [f"| {' | '.join([f.name, *cells])} |" for f, cells in sorted(mine.items(), key=lambda it: it[0].name)]
        lines.append("")
    return "\n".join(lines)


def _counts(rows: dict[Family, list[str]]) -> str:
    states = [first(cells) for cells in rows.values()]
    return ", ".join(f"{states.count(state)} {state}" for state in _ORDER)


_ORDER: tuple[State, ...] = ("wrong", "refused", "transformers", "not built", "right")


def first(states: Iterable[str]) -> State:
    """The first of wrong, refused, transformers, not built and right that is there."""
    given = set(states)
    return next(state for state in _ORDER if state in given)


def worst(outcomes: dict[str, Outcome]) -> State:
    """:func:`first` of what a family's checks have found."""
    return first(outcome.state for outcome in outcomes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all by default. The other rows of a table stay as they are")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--table", type=Path, help="file to write")
    parser.add_argument("--workers", type=int, default=1, help="families at once")
    parser.add_argument("--seconds", type=float, default=60, help="most for a family")
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = [family for task in TASKS for family in families(task)]
    wanted = [f for f in every if f.task in given.tasks and (not given.names or f.name in given.names)]
    rows = rows_of(given.table.read_text()) if given.table and given.table.is_file() else {}
    rows = {family: cells for family, cells in rows.items() if family in every and family not in wanted}

    def look(family: Family) -> tuple[Family, dict[str, Outcome], float]:
        begun = time.monotonic()
        return family, sweep_apart(family, given.seconds), time.monotonic() - begun

    with ThreadPoolExecutor(given.workers) as pool:
        for done in as_completed([pool.submit(look, family) for family in wanted]):
            family, found, seconds = done.result()
            rows[family] = row(found, seconds)
            said = "; ".join(f"{name} {o.state} {o.why}" for name, o in found.items() if o.why)
            sys.stdout.write(f"{family}: {worst(found)} in {seconds:.0f} s. {said}\n")
            sys.stdout.flush()
            if given.table:
                given.table.parent.mkdir(parents=True, exist_ok=True)
                given.table.write_text(table(rows, len(every)))


if __name__ == "__main__":
    main()
