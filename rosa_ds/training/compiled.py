"""A model's blocks through torch.compile: which of them share a graph, and what is told of the graphs that are made.

Blocks of one kind run the same graph, and numbers of rows and tokens are variables of it. So a model of 30 blocks is compiled
in about the time that one takes; embedding, head and loss, and the mask of attention, stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
MAX_GRAPHS = 16
"""Of one kind of block: first and later ones, training and evaluating, before and after a mask, one row and several make twelve."""


@contextlib.contextmanager
def compiled(model: nn.Module, backend: str) -> Iterator[None]:
    """Inside, a model's blocks make graphs of themselves as they are needed, and dropout draws what it draws without.

    Where a kind of block would need more than :data:`MAX_GRAPHS`, which is told, what has no graph runs operation by operation.

    Args:
        backend: of torch.compile.
    """
    import torch._dynamo.config  # slow imports, which only this needs
    import torch._inductor.config
    import torch.fx.experimental._config

    graphs = _Graphs()
    handler = torch._dynamo.callback_handler
    with contextlib.ExitStack() as closing:
        closing.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        closing.callback(torch._dynamo.reset)
        # a layer's scale is a number of its graph: as a variable it would have everything compiled twice
        closing.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, specialize_float=True))
        closing.enter_context(torch._inductor.config.patch(fallback_random=True))
        # two sizes that are equal at first are two variables
        closing.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
        handler.register_start_callback(graphs.start)
        closing.callback(handler.remove_start_callback, graphs.start)
        handler.register_end_callback(graphs.end)
        closing.callback(handler.remove_end_callback, graphs.end)
        for block in blocks(model):
            block.compile(backend=backend, dynamic=True)
            closing.callback(setattr, block, "_compiled_call_impl", None)
        yield
        logger.info("torch.compile: %s", graphs.summary())


def as_it_is() -> contextlib.AbstractContextManager[object]:
    """Inside, compiled blocks run operation by operation."""
    return torch.compiler.set_stance("force_eager")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost lists of modules that have parameters; of one without such lists itself."""
    found: list[nn.Module] = []
    waiting = [model]
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, nn.ModuleList):
            found += [member for member in module if next(member.parameters(), None) is not None]
        else:
            waiting += module.children()
    return found or [model]


class _Graphs:
    """What torch compiles in a run."""

    def __init__(self) -> None:
        self.seconds = self._begun = 0.0
        self._told = False
        self._before = self._counts()

    @staticmethod
    def _counts() -> tuple[int, int]:
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def start(self, _: Any) -> None:
        self._begun = time.monotonic()

    def end(self, compilation: Any) -> None:
        self.seconds += time.monotonic() - self._begun
        if compilation.callback_trigger.name != "DYNAMO":
            return
        number = int(compilation.compile_id.rpartition("/")[2])  # of the function's graphs, from 0 on
        if number == MAX_GRAPHS - 1 and not self._told:
            self._told = True
            logger.warning(
                "torch.compile has made %d graphs of one function and makes no more of it: what needs another runs uncompiled, which "
                "is slower; TORCH_LOGS=recompiles says why there are so many",
                MAX_GRAPHS,
            )

    def summary(self) -> str:
        made, broken = (now - before for now, before in zip(self._counts(), self._before, strict=True))
        return f"{made} graphs in {self.seconds:.1f} s, {broken} graph breaks"
