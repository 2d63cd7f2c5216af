"""Tasks of EleutherAI's lm-evaluation-harness on a model in memory. Extra: ``lm-eval``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds.data.turn_end import stop_tokens


def harness_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """The harness' own figures of each task, as it names them (``acc,none``), with its standard errors.

    What it lets the model write ends at the tokens that end it elsewhere, too (:func:`rosa_ds.data.turn_end.stop_tokens`).

    Args:
        tasks: names that the harness knows, or that task files in ``folder`` give.
        limit: rows of each task; ``None``: all.

    Raises: ValueError where the harness is not installed, or does not know a task.
    """
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"--harness {unknown[0]}: lm-eval {lm_eval.__version__} has no such task: `lm-eval ls tasks` lists them; your own are found "
            "with --harness-tasks FOLDER"
        )
    config = model.generation_config
    stops = stop_tokens(config.eos_token_id, tokenizer)
    ends = [token.content for index, token in tokenizer.added_tokens_decoder.items() if index in stops]

    class Stopping(HFLM):
        """Writes nothing behind a stop token, nor the token where it is no special one."""

        def generate_until(self, requests: Any, *arguments: Any, **more: Any) -> list[str]:
            own, config.eos_token_id = config.eos_token_id, stops or None
            try:
                written = super().generate_until(requests, *arguments, **more)
            finally:
                config.eos_token_id = own
            return [min((text.split(end)[0] for end in ends), key=len, default=text) for text in written]

    wrapped = Stopping(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    result = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit)
    assert result is not None, "the harness answers on the first rank, and there is one"
    return {
        task: {key: value for key, value in found.items() if key != "alias"}
        for task, found in result["results"].items()
    }


def require_harness() -> None:
    """Raise ValueError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--harness needs lm-eval: pip install 'rosa-ds[lm-eval]'")
