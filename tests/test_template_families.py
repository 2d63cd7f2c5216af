"""What is trained with the published chat templates, which TRL ships, against what is written here by hand of each family.

A second derivation are the templates that TRL marks for training; a third, what the template itself renders.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chat_families import byte_level_of_gpt4, wrap
from rosa_ds.data.formats import Conversation, parse_row
from rosa_ds.data.tokenise import sequences

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family writes the assistant's turns behind its generation prompt. Empty: as without it.

    Attributes:
        answer: ``ANSWER`` stands for the content.
        call: of a tool; empty: the template writes none, which is refused.
        thought: an answer with reasoning, ``THOUGHT``; empty: the template leaves the reasoning out, which is said.
        thought_call: a call with reasoning.
        to_result: an answer to a tool's result; ``thought_to_result`` one with reasoning.
        tools: the template has a place for the descriptions of tools; if not, that is said.
        system: why a system prompt is refused.
        parts: the template reads contents that are lists of parts; ``text_arguments``: arguments of calls that are texts.
    """

    answer: str
    call: str = ""
    thought: str = ""
    thought_call: str = ""
    to_result: str = ""
    thought_to_result: str = ""
    tools: bool = True
    system: str = ""
    parts: bool = False
    text_arguments: bool = False


_CALLED = '{"name": "add", "arguments": {"city": "VALUE"}}'
_JSON = f"<tool_call>\n{_CALLED}\n</tool_call>"
_XML = "<tool_call>\n<function=add>\n<parameter=city>\nVALUE\n</parameter>\n</function>\n</tool_call>"
_IM = "<|im_end|>"
_EOT = "<|END_OF_TURN_TOKEN|>"
_DEEPSEEK = "<｜end▁of▁sentence｜>"
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT = "<think>\nTHOUGHT\n</think>\n\n"

_CHATML = Family(answer=f"ANSWER{_IM}", call=f"{_JSON}{_IM}")
_LLAMA_3_1 = Family(answer="ANSWER<|eot_id|>", call='{"name": "add", "parameters": {"city": "VALUE"}}<|eot_id|>')
_PHI = Family(answer="ANSWER<|end|>", tools=False)
_VISION = Family(answer=" ANSWER<end_of_utterance>", tools=False, parts=True)
_LFM_CALL = f"<|tool_call_start|>[add(city='VALUE')]<|tool_call_end|>{_IM}"
_LFM_2_5 = Family(
    answer=f"ANSWER{_IM}",
    call=_LFM_CALL,
    thought=f"<think>THOUGHT</think>ANSWER{_IM}",
    thought_call=f"<think>THOUGHT</think>{_LFM_CALL}",
)
_QWEN_THINKS = Family(  # its generation prompt begins the block
    answer=f"\n</think>\n\nANSWER{_IM}",
    call=f"\n</think>\n\n{_XML}{_IM}",
    thought=f"THOUGHT\n</think>\n\nANSWER{_IM}",
    thought_call=f"THOUGHT\n</think>\n\n{_XML}{_IM}",
)
_NEMOTRON = Family(
    answer=f"</think>ANSWER{_IM}",
    call=f"</think>\n{_XML}\n{_IM}",
    thought=f"THOUGHT\n</think>\nANSWER{_IM}",
    thought_call=f"THOUGHT\n</think>\n{_XML}\n{_IM}",
)
_NEMOTRON_TIGHT = dataclasses.replace(
    _NEMOTRON, thought=f"THOUGHT</think>ANSWER{_IM}", thought_call=f"THOUGHT</think>\n{_XML}\n{_IM}"
)
_GEMMA_CALL = '<|tool_call>call:add{city:<|"|>VALUE<|"|>}<tool_call|><|tool_response>'  # where the model is to stop
_GEMMA_THOUGHT = "<|channel>thought\nTHOUGHT\n<channel|>"
_GEMMA_4 = Family(answer="ANSWER<turn|>", call=_GEMMA_CALL, thought_call=_GEMMA_THOUGHT + _GEMMA_CALL)
_GEMMA_4_V5 = dataclasses.replace(_GEMMA_4, thought=f"{_GEMMA_THOUGHT}ANSWER<turn|>")
_R1 = Family(answer=f"\n</think>\n\nANSWER{_DEEPSEEK}", thought=f"THOUGHT\n</think>\n\nANSWER{_DEEPSEEK}", tools=False)
_V3_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
    f'```json\n{{"city": "VALUE"}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{_DEEPSEEK}'
)
_GLM_CALL = "\n<tool_call>add\n<arg_key>city</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call></s>"
_MUSE_CALL = (
    ' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n<atem:parameter name="city">VALUE</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls><|eot|>"
)
_GPT_OSS_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"city": "VALUE"}<|call|>'
_GPT_OSS_THOUGHT = "<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant"
_GPT_OSS_ANSWER = "<|channel|>final<|message|>ANSWER<|return|>"

FAMILIES = {
    "cohere": Family(answer=f"ANSWER{_EOT}", tools=False),
    "cohere2": Family(answer=f"ANSWER<|END_RESPONSE|>{_EOT}", tools=False),
    "deepseek_r1_distill": _R1,
    "deepseekv3": dataclasses.replace(
        _R1,
        call=f"\n</think>\n\n{_V3_CALL}",
        thought_call=f"THOUGHT\n</think>\n\n{_V3_CALL}",
        to_result=f"ANSWER{_DEEPSEEK}",
        text_arguments=True,
    ),
    "diffusion_gemma": dataclasses.replace(  # no generation prompt behind a result
        _GEMMA_4_V5,
        to_result="<|turn>model\nANSWER<turn|>",
        thought_to_result=f"<|turn>model\n{_GEMMA_THOUGHT}ANSWER<turn|>",
    ),
    "gemma": Family(answer="ANSWER<end_of_turn>", tools=False, system="System role not supported"),
    "gemma3": Family(answer="ANSWER<end_of_turn>", tools=False),
    "gemma4": _GEMMA_4,
    "gemma4_v2": Family(answer="ANSWER<turn|>", call=_GEMMA_CALL.replace("<|tool_response>", "<turn|>")),
    "gemma4_v3": _GEMMA_4,
    "gemma4_v4": _GEMMA_4,
    "gemma4_v5": _GEMMA_4_V5,
    "glm4moe": Family(  # a turn ends with nothing of the template's, so with the end of text
        answer="\n<think></think>\nANSWER</s>",
        call=f"\n<think></think>{_GLM_CALL}",
        thought="\n<think>THOUGHT</think>\nANSWER</s>",
        thought_call=f"\n<think>THOUGHT</think>{_GLM_CALL}",
    ),
    "gptoss": Family(
        answer=_GPT_OSS_ANSWER,
        call=_GPT_OSS_CALL,
        thought=_GPT_OSS_THOUGHT + _GPT_OSS_ANSWER,
        thought_call=_GPT_OSS_THOUGHT + _GPT_OSS_CALL,
    ),
    "idefics3": _VISION,
    "lfm2": Family(answer=f"ANSWER{_IM}"),
    "lfm2_2_5": _LFM_2_5,
    "lfm2_2_5_v2": _LFM_2_5,
    "lfm2_2_5_vl": _LFM_2_5,
    "lfm2_v2": Family(answer=f"ANSWER{_IM}", call=_LFM_CALL),
    "llama3": Family(answer="ANSWER<|eot_id|>", tools=False),
    "llama3_1": _LLAMA_3_1,
    "llama3_2": _LLAMA_3_1,
    "llava_next": Family(answer=" ANSWER</s>", tools=False, parts=True),
    "muse_glimmer": Family(
        answer=" to=user<|message|>ANSWER<|eot|>",
        call=_MUSE_CALL,
        thought=" to=self<|message|>THOUGHT<|eom|><|start|>assistant to=user<|message|>ANSWER<|eot|>",
        thought_call=f" to=self<|message|>THOUGHT<|eom|><|start|>assistant{_MUSE_CALL}",
    ),
    "nemotron_3_5_lightning": _NEMOTRON_TIGHT,
    "nemotron_3_nano": _NEMOTRON,
    "nemotron_3_super": _NEMOTRON,
    "nemotron_3_ultra": _NEMOTRON_TIGHT,
    "phi3": _PHI,
    "phi3_5": _PHI,
    "qwen2_5": _CHATML,
    "qwen2_5_vl": Family(answer=f"ANSWER{_IM}", tools=False),
    "qwen3": Family(
        answer=f"{_NO_THOUGHT}ANSWER{_IM}",
        call=f"{_NO_THOUGHT}{_JSON}{_IM}",
        thought=f"{_THOUGHT}ANSWER{_IM}",
        thought_call=f"{_THOUGHT}{_JSON}{_IM}",
    ),
    "qwen3_5_nothink": Family(answer=f"ANSWER{_IM}", call=f"{_XML}{_IM}"),  # its generation prompt has an empty block
    "qwen3_5_think": _QWEN_THINKS,
    "qwen3_6": _QWEN_THINKS,
    "qwen3_8": _QWEN_THINKS,
    "qwen3_instruct_2507": _CHATML,
    "qwen3_vl": _CHATML,
    "smolvlm": _VISION,
}
OTHER_MARKERS = {
    "deepseek_r1_distill": "the generation prompt begins a block, which the marked turn does not",
    "deepseekv3": "the generation prompt begins a block, which the marked turn does not",
    "diffusion_gemma": "a call's last token and what stands behind a result are not marked",
    "glm4moe": "the first token of the next turn is marked, in the place of an end of text",
    "phi3": "the end of the whole text is marked, too",
    "phi3_5": "the end of the whole text is marked, too",
}
"""Why what TRL marks is not what follows the generation prompt."""

TOOL = {
    "name": "add",
    "description": "DESCRIPTION",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "a city"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": {"city": "VALUE"}}}
RESULT = {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "add", "content": "RESULT"}


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"QUESTION{number}"}


def assistant(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"ANSWER{number}", **more}


def thinking(number: int) -> dict[str, str]:
    return {"reasoning_content": f"THOUGHT{number}"}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user(1), assistant(1)]},
    "several turns": {"messages": [user(1), assistant(1), user(2), assistant(2), user(3), assistant(3)]},
    "system": {"messages": [{"role": "system", "content": "SYSTEM"}, user(1), assistant(1)]},
    "tools": {"messages": [user(1), assistant(1)], "tools": TOOLS},
    "calls": {"messages": [user(1), assistant(1, content="", tool_calls=[CALL]), RESULT, assistant(2)], "tools": TOOLS},
    "reasoning": {"messages": [user(1), assistant(1, **thinking(1)), user(2), assistant(2, **thinking(2))]},
    "reasoning and calls": {
        "messages": [
            user(1),
            assistant(1, content="", tool_calls=[CALL], **thinking(1)),
            RESULT,
            assistant(2, **thinking(2)),
        ],
        "tools": TOOLS,
    },
}


def template_of(name: str) -> str | None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


@functools.cache
def trained_tokenizer() -> str:
    return byte_level_of_gpt4().to_str()


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """One that has the marks of the template as special tokens."""
    template = template_of(name)
    assert template is not None, f"TRL ships no template {name}"
    tokenizer = wrap(Tokenizer.from_str(trained_tokenizer()), template)
    marks = re.findall(r"<\|[\w ]+\|?>|<｜[\w▁]+｜>|<\w+\|>|<end_of_\w+>|<\|\"\|>|\[/?INST\]", template)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(marks))})
    return tokenizer


def by_hand(family: Family, messages: Messages) -> tuple[list[str], bool]:
    """What each turn of the assistant has to be, and whether the template leaves some of the reasoning out."""
    turns, left_out = [], False
    for before, message in zip([{"role": ""}, *messages], messages, strict=False):
        if message["role"] != "assistant":
            continue
        thinks = "reasoning_content" in message
        if "tool_calls" in message:
            shown, plain = family.thought_call, family.call
        elif before["role"] == "tool" and family.to_result:
            shown, plain = family.thought_to_result, family.to_result
        else:
            shown, plain = family.thought, family.answer
        left_out |= thinks and not shown
        form = (thinks and shown) or plain
        turns.append(
            form.replace("ANSWER", message["content"]).replace("THOUGHT", message.get("reasoning_content", ""))
        )
    return turns, left_out


def for_template(family: Family, messages: Messages) -> Messages:
    """As the template reads them, with reasoning under each of the names that templates know."""
    made = []
    for message in messages:
        message = dict(message)
        if thought := message.get("reasoning_content"):
            message |= {"reasoning": thought, "thinking": thought}
        if family.text_arguments and "tool_calls" in message:
            function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
            message["tool_calls"] = [{**CALL, "function": function}]
        if family.parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        made.append(message)
    return made


def asked_and_trained(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Of each trained stretch the ids before it and its own."""
    example = parse_row(row)
    assert isinstance(example, Conversation)
    found = []
    for tokens in sequences(example, tokenizer, "\n"):
        starts = [n for n, on in enumerate(tokens.trained) if on and not tokens.trained[n - 1]]
        for start in starts:
            stop = next((n for n in range(start, len(tokens.ids)) if not tokens.trained[n]), len(tokens.ids))
            found.append((tokens.ids[:start], tokens.ids[start:stop]))
    return found


def refusal_of(family: Family, conversation: str) -> str | None:
    if conversation == "system" and family.system:
        return family.system
    return "does not show that message 2 calls 'add'" if "calls" in conversation and not family.call else None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained(name: str, conversation: str) -> None:
    family, row, tokenizer = FAMILIES[name], CONVERSATIONS[conversation], tokenizer_of(name)
    messages, tools = row["messages"], row.get("tools")
    tokenizer.chat_template = (
        f"{template_of(name)}{{# {conversation} #}}"  # what is left out is said once of a template
    )
    refused = refusal_of(family, conversation)
    if refused:
        with pytest.raises(ValueError, match=refused):
            asked_and_trained(tokenizer, row)
        return
    found = asked_and_trained(tokenizer, row)
    expected, _ = by_hand(family, messages)
    assert [tokenizer.decode(trained) for _, trained in found] == expected
    read = for_template(family, messages)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number, (asked, _), text in zip(turns, found, expected, strict=True):
        prompt = tokenizer.apply_chat_template(read[:number], tools=tools, tokenize=False, add_generation_prompt=True)
        assert asked == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert not tools or ("DESCRIPTION" in prompt) == family.tools
        assert not any(message["role"] == "system" for message in messages) or "SYSTEM" in prompt
        finished = tokenizer.apply_chat_template(read[: number + 1], tools=tools, tokenize=False)
        if finished.startswith(prompt):
            rest = finished.removeprefix(prompt)
            assert rest.startswith(text.removesuffix("</s>"))
            assert rest.removeprefix(text.removesuffix("</s>")).strip() in ("", "</s>")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    plain, tokenizer.chat_template = tokenizer.chat_template, f"{tokenizer.chat_template}{{# once of a template #}}"
    left_out = False
    with caplog.at_level(logging.WARNING):
        for conversation, row in CONVERSATIONS.items():
            if not refusal_of(family, conversation):
                asked_and_trained(tokenizer, row)
                left_out |= by_hand(family, row["messages"])[1]
    tokenizer.chat_template = plain
    assert ("the rows' tools are left out" in caplog.text) == (not family.tools)
    assert ("reasoning" in caplog.text) == left_out


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in OTHER_MARKERS and template_of(f"{name}_training")]
)
def test_what_trl_marks(name: str) -> None:
    """Where the template that it marks asks as the published one does, but for a line break behind the end of a turn."""
    marked = template_of(f"{name}_training")
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    compared = 0
    for conversation, row in CONVERSATIONS.items():
        if refusal_of(family, conversation):
            continue
        messages, tools = for_template(family, row["messages"]), row.get("tools")
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number, (asked, trained) in zip(turns, asked_and_trained(tokenizer, row), strict=True):
            (text,), marks = render_jinja_template(
                conversations=[messages[: number + 1]],
                tools=tools,
                chat_template=marked,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            prompt = tokenizer.decode(asked)
            if text.startswith(prompt):
                inside = "".join(text[max(a, len(prompt)) : b] for a, b in marks[0] if b > len(prompt))
                assert inside.rstrip("\n") == tokenizer.decode(trained)
                compared += 1
    assert compared
