"""The clock of a chat template: one that writes the date (``strftime_now``) renders the same chat otherwise tomorrow."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from datetime import datetime

from transformers import PreTrainedTokenizerBase

_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#]*\d*[EO]?[A-Za-z]")  # {%if begins a tag
_STANDING = "{% macro strftime_now(format) %}"


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer may write the date or the time of the day."""
    return any(_is_running(template) for template in _templates(tokenizer).values())


def stop_clock(tokenizer: PreTrainedTokenizerBase, moment: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or where its chat template reads the clock a copy whose template shows ``moment`` (ISO 8601; None: now).

    Of the moment the new template holds what the old one may show of it: two moments of a day make the same template of one
    that shows the date alone. It is for rendering, not to be saved: whoever serves the model writes the date of the day.
    """
    if not reads_clock(tokenizer):
        return tokenizer
    at = datetime.now() if moment is None else datetime.fromisoformat(moment)
    stopped = copy.copy(tokenizer)
    templates = {name: _stop(text, at) if _is_running(text) else text for name, text in _templates(tokenizer).items()}
    stopped.chat_template = templates if isinstance(tokenizer.chat_template, Mapping) else templates[""]
    return stopped


def _templates(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, str]:
    template = tokenizer.chat_template or ""
    return template if isinstance(template, Mapping) else {"": template}


def _is_running(template: str) -> bool:
    return "strftime_now" in template and not template.startswith(_STANDING)


def _stop(template: str, moment: datetime) -> str:
    """The template behind a macro in place of the function that transformers gives it (a variable would not do: its versions
    differ in what wins).
    """
    shown = sorted(set(_DIRECTIVE.findall(template)), key=lambda directive: (-len(directive), directive))
    filters = "".join(f" | replace({directive!r}, {moment.strftime(directive)!r})" for directive in shown)
    body = f"{{{{ format | replace('%%', '\\x00'){filters} | replace('\\x00', '%') }}}}"
    return f"{_STANDING}{body}{{% endmacro %}}\n{template}"
