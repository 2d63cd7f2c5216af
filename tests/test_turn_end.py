"""The token that ends a trained turn ends a generation too: in evaluation, in exports and by what the adapter's folder says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import rosa_ds
from launching import SMALL, TRAIN, kill, start, wait_for_step
from rosa_ds.checkpoints.source import open_source
from rosa_ds.commands import eval
from rosa_ds.config.schema import AdapterConfig, DataSettings
from rosa_ds.data.chat import choose_template
from rosa_ds.data.formats import Pair
from rosa_ds.data.tokenise import tokenise
from rosa_ds.data.turn_end import end_of_turn, stop_tokens
from rosa_ds.evaluation.causal_lm import perplexity
from rosa_ds.evaluation.generate import Generation, continuations, generate
from rosa_ds.export.adapted import load_adapted, load_merged
from rosa_ds.export.merge import export_adapter, export_merged, export_peft
from scripted import CHATML, SPECIAL, byte_tokenizer, scripted

TEMPLATES = {
    "chatml": (CHATML, "<im_end>"),
    "marked content": (
        "{% for m in messages %}<im_start>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<im_end>\n{% endfor %}",
        "<im_end>",
    ),
    "end of text behind an answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
        "{{ eos_token }}{% endif %}{% endfor %}",
        "<end>",
    ),
    "end of text behind the conversation": (
        "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<im_end>\n{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<im_end>",
    ),
    "another end of the last turn": (
        "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' and loop.last %}<return>"
        "{% else %}<im_end>{% endif %}{% endfor %}",
        "<return>",
    ),
    "content in brackets of its own": (
        "{% for m in messages %}<im_start>{% if m.role == 'assistant' %}<response>{{ m.content }}</response>{% else %}{{ m.content }}"
        "{% endif %}<im_end>{% endfor %}",
        "<im_end>",
    ),
    "the next header": ("{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% endfor %}", None),
    "a line's end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "one turn alone": (
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML,
        "<im_end>",
    ),
    "none that it takes": ("{{ raise_exception('no') }}", None),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_end_of_a_turn(kind: str) -> None:
    template, expected = TEMPLATES[kind]
    tokenizer = byte_tokenizer(template)
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_the_end_of_a_pair_is_the_end_of_text() -> None:
    assert end_of_turn(byte_tokenizer()) == SPECIAL.index("<end>")
    assert end_of_turn(byte_tokenizer(eos=None)) is None


def test_one_template_of_several_names() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    assert end_of_turn(tokenizer) == SPECIAL.index("<im_end>")


def test_arguments_that_decide_the_end() -> None:
    """They are the template's own defaults, so the end of a turn is that of the chats that are trained."""
    template = CHATML.replace("<im_end>", "{{ '<return>' if short else '<im_end>' }}")
    plain, short = byte_tokenizer(template), byte_tokenizer(template)
    choose_template(short, DataSettings(template_arguments={"short": True}))
    assert stop_tokens(0, plain) == [0, SPECIAL.index("<im_end>")]
    assert stop_tokens(0, short) == [0, SPECIAL.index("<return>")]
    assert tokenise(Pair("q", "a"), short, "\n").ids[-1] == SPECIAL.index("<return>")


def test_an_end_that_is_no_special_token() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}  <done>\n{% endfor %}")
    tokenizer.add_tokens(["<done>", "  "])  # some tokenizers have runs of spaces as added tokens
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<done>")


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, [0, 4]), (0, [0, 4]), (4, [4, 0]), ([7, 0], [7, 0, 4]), ([4, 0, 9], [4, 0, 9])],
)
def test_a_models_own_stop_tokens_come_first(configured: int | list[int] | None, expected: list[int]) -> None:
    assert stop_tokens(configured, byte_tokenizer(CHATML)) == expected


# -- generation ----------------------------------------------------------------------------------------------------


def test_generation_stops_at_the_end_of_the_turn() -> None:
    tokenizer = byte_tokenizer(CHATML)
    model = scripted(tokenizer, "Oslo<im_end>\n<im_start>user\nand")
    assert model.generation_config.eos_token_id == 0
    prompts = [[12, 13, 14], [15, 16, 17]]
    assert generate(model, tokenizer, prompts, Generation(max_new_tokens=40)) == ["Oslo", "Oslo"]
    assert continuations(model, tokenizer, prompts, Generation(max_new_tokens=40)) == [model.script[:4]] * 2
    tokenizer.chat_template = None
    assert generate(model, tokenizer, prompts, Generation(max_new_tokens=12)) == ["Oslo\nuser\n"] * 2


def test_an_end_that_is_no_special_token_is_not_in_the_text() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}<done>{% endfor %}")
    tokenizer.add_tokens(["<done>"])
    model = scripted(tokenizer, "Oslo<done>")
    assert generate(model, tokenizer, [[12, 13, 14]], Generation(max_new_tokens=40)) == ["Oslo"]


def test_a_tokenizer_without_padding_and_end_of_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos=None)
    tokenizer.pad_token = None
    model = scripted(tokenizer, "ab")
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, [[12, 13, 14]], Generation(max_new_tokens=4)) == ["abab"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": "abc"}\n')
    padded = byte_tokenizer(eos=None)
    plain = LlamaForCausalLM(model.config).eval()
    found = [
        perplexity(plain, each, str(tmp_path / "rows.jsonl"), DataSettings(), 2, 0) for each in (tokenizer, padded)
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with an adapter, on a base that knows the end of text alone."""
    tokenizer = byte_tokenizer(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=0,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    rosa_ds.inject(base, AdapterConfig(method="lora", rank=2), seed=1)
    stops = stop_tokens(base.generation_config.eos_token_id, tokenizer)
    rosa_ds.save_adapter(
        base, tmp_path / "run" / "adapter", base={"name_or_path": str(tmp_path / "base")}, stop_tokens=stops
    )
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def test_the_adapters_folder_names_its_stop_tokens(run: Path) -> None:
    assert json.loads((run / "adapter" / "rosa_adapter.json").read_text())["stop_tokens"] == [0, 4]
    assert open_source(run).description.stop_tokens == (0, 4)


def test_a_folder_of_before_names_none(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "rosa_adapter.json"
    content = json.loads(path.read_text())
    del content["stop_tokens"]
    path.write_text(json.dumps(content))
    assert rosa_ds.load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), run / "adapter").stop_tokens == ()


@pytest.mark.parametrize("of", ["run", "adapter alone"])
def test_exports_name_the_end_of_the_turn(run: Path, of: str, tmp_path: Path) -> None:
    if of == "adapter alone":  # without the run's tokenizer, its template and so the end of its turns
        run = export_adapter(run, tmp_path / "alone")
    out = export_merged(run, tmp_path / "out", None)
    written = GenerationConfig.from_pretrained(out)
    assert written.eos_token_id == [0, 4]
    assert written.pad_token_id == 1
    assert not json.loads((out / "generation_config.json").read_text()).get("_from_model_config")
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == [0, 4]
    peft = export_peft(run, tmp_path / "peft", None)
    assert json.loads((peft / "rosa_ds.json").read_text())["stop_tokens"] == [0, 4]


@pytest.mark.parametrize("own", [[7, 4, 0], 0], ids=["has them", "has one"])
def test_nothing_that_a_base_has_is_removed(run: Path, own: int | list[int], tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=own, pad_token_id=9, temperature=0.5, do_sample=True).save_pretrained(
        tmp_path / "base"
    )
    for load in (load_merged, load_adapted):
        config = load(open_source(run), torch.float32).generation_config
        assert config.eos_token_id == (own if isinstance(own, list) else [0, 4])
        assert (config.pad_token_id, config.temperature) == (9, 0.5)


def test_a_base_that_stops_there_already_stays_as_it_is(run: Path) -> None:
    byte_tokenizer().save_pretrained(run / "tokenizer")
    (run / "tokenizer" / "chat_template.jinja").unlink()
    source = open_source(run)
    source = dataclasses.replace(source, description=dataclasses.replace(source.description, stop_tokens=()))
    config = load_merged(source, torch.float32).generation_config
    assert (config.eos_token_id, config.pad_token_id) == (0, None)


@pytest.mark.parametrize("of", ["run", "base"])
def test_a_template_for_an_evaluation(of: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base is asked with it, and a run with it in place of its own, which is said."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    out = tmp_path / "out.json"
    asked = ("--data", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "2", "--bootstrap", "0", "--output", str(out))
    template = "{% if style %}{{ style }}: {% endif %}" + CHATML

    def prompt(*arguments: str) -> str:
        caplog.clear()
        eval.main([str(run if of == "run" else tmp_path / "base"), *asked, *arguments])
        said = [record for record in caplog.records if "is not asked as it was trained" in record.getMessage()]
        assert len(said) == (of == "run" and bool(arguments))
        return str(json.loads(out.read_text())["samples"][0]["prompt"])

    chat = "<im_start>user\nq<im_end>\n<im_start>assistant\n"
    assert prompt() == (chat if of == "run" else "q\n")
    assert prompt("--chat-template", template) == chat
    assert prompt("--chat-template", template, "--template-arguments", '{"style": "brief"}') == f"brief: {chat}"
    tokenizer = byte_tokenizer(template)
    choose_template(tokenizer, DataSettings(template_arguments={"style": "long"}))
    tokenizer.save_pretrained(run / "tokenizer" if of == "run" else tmp_path / "base")
    assert prompt() == f"long: {chat}"
    assert prompt("--template-arguments", '{"style": "brief"}') == f"brief: {chat}"


def test_a_classifier_has_none(run: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tmp_path / "base", num_labels=2, pad_token_id=1)
    base = LlamaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    rosa_ds.inject(base, AdapterConfig(method="lora", rank=2), seed=1)
    origin = {"name_or_path": str(tmp_path / "base"), "task": "classification", "labels": ["a", "b"]}
    rosa_ds.save_adapter(base, run / "adapter", base=origin)
    out = export_merged(run, tmp_path / "out", None)
    assert not (out / "generation_config.json").exists()
    assert json.loads((export_peft(run, tmp_path / "peft", None) / "rosa_ds.json").read_text())["stop_tokens"] == []


@pytest.mark.ranks
def test_the_checkpoint_of_a_killed_run(tmp_path: Path) -> None:
    """It asks and stops as the run that has not ended; also where it was taken out of the run's folder."""
    (tmp_path / "own.jinja").write_text(CHATML.replace("<im_start>", "<|user|>").replace("<im_end>", "<|system|>"))
    arguments = (*SMALL, "--method", "lora", "--data.chat_template", str(tmp_path / "own.jinja"))
    process = start(
        "python", 1, TRAIN, *arguments, "--training.save_steps", "2", "--training.epochs", "99", cwd=tmp_path
    )
    folder = tmp_path / "runs" / "default"
    wait_for_step(process, folder, 3)
    kill(process)
    assert not (folder / "adapter").exists()
    saved = next(path for path in (folder / "checkpoints").glob("step-*"))
    shutil.copytree(saved, tmp_path / "alone" / "checkpoints" / saved.name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    for number, path in enumerate((folder, saved, tmp_path / "alone" / "checkpoints" / saved.name)):
        output = tmp_path / "out.json"
        eval.main([str(path), "--data", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "2", "--output", str(output)])
        (sample,) = json.loads(output.read_text())["samples"]
        assert sample["prompt"] == "<|user|>user\nq<|system|>\n<|user|>assistant\n"
        out = export_merged(path, tmp_path / str(number), None)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == (tmp_path / "own.jinja").read_text()
        eos = GenerationConfig.from_pretrained(out).eos_token_id
        assert eos == tokenizer.convert_tokens_to_ids(["<|end|>", "<|system|>"])
