"""From files to token ids, loss masks and batches."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerBase

from rosa_ds.commands.dispatch import dispatch
from rosa_ds.config.command_line import build_config
from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.config.template import Template
from rosa_ds.data.batches import IGNORE, Batching, BatchPlan, Part, collate, epoch_order
from rosa_ds.data.formats import Conversation, Pair, PlainText, parse_row
from rosa_ds.data.prepare import fingerprint, prepare, worker_count
from rosa_ds.data.sources import load_rows
from rosa_ds.data.sql import generate_pairs
from rosa_ds.data.tokenise import Tokens, prompt_and_reference, sequences, show_sample, tokenise
from rosa_ds.models.grammar import generate_conversations
from rosa_ds.models.load import load_tokenizer
from rosa_ds.training.task import prepare_data
from rosa_ds.utils.errors import RunError

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TWO_TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Eins."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Zwei."},
)


def another(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(ModelSettings())
    tokenizer.chat_template = template
    return tokenizer


def trained_text(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([token for token, on in zip(tokens.ids, tokens.trained, strict=True) if on])


# -- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, None, Pair("a", "b")),
        ({"question": "a", "answer": 42, "id": 3}, None, Pair("a", "42")),
        ({"mr": "a", "ref": "b"}, ("mr", "ref"), Pair("a", "b")),
        ({"text": "a"}, None, PlainText("a")),
        (
            {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]},
            None,
            Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
    ],
    ids=["prompt", "question", "named", "text", "messages"],
)
def test_rows(row: dict[str, Any], columns: tuple[str, str] | None, expected: object) -> None:
    assert parse_row(row, columns) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "output": "b"}, "the columns 'input', 'output' fit no format"),
        ({"prompt": "a", "completion": " "}, "'completion' is a text that is not empty, given ' '"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' is a text that is not empty, given .'a'."),
        ({"messages": []}, "is a list of"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 is not an object with a role"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1 has role 'human'; allowed are"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message is the user's"),
    ],
    ids=["columns", "empty", "list", "no messages", "no content", "role", "order"],
)
def test_rejects_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(row)


def test_a_prompt_of_several_columns() -> None:
    row = {"question": "How many?", "table schema": "t (a)", "answer": "3"}
    template = Template("Given {{{table schema}}}:\n{question}")
    assert parse_row(row, (template, "answer")) == Pair("Given {t (a)}:\nHow many?", "3")
    with pytest.raises(ValueError, match="there is no column 'quest'"):
        parse_row(row, (Template("{quest}"), "answer"))


@pytest.mark.parametrize("text", ["no column", "{}", "{a", "a}", "{a!r}", "{a:>9}"])
def test_a_template_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="the template"):
        Template(text)


def test_another_rule_of_the_tokenizer_is_another_cache_entry() -> None:
    """The same vocabulary and template, and other tokens around a text."""
    tokenizer, settings = load_tokenizer(ModelSettings()), DataSettings()
    rows = load_rows("builtin:sql[:2]", "data.train")
    before = fingerprint(rows, tokenizer, settings)
    tokenizer("a b", truncation=True, max_length=1)
    assert fingerprint(rows, tokenizer, settings) == before
    names = [before]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    names.append(fingerprint(rows, tokenizer, settings))
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    names.append(fingerprint(rows, tokenizer, settings))
    assert len(set(names)) == 3


def test_named_column_that_is_missing() -> None:
    with pytest.raises(ValueError, match="there is no column 'reff'. Did you mean ref"):
        parse_row({"mr": "a", "ref": "b"}, ("mr", "reff"))
    with pytest.raises(ValueError, match=r"Did you mean 'Answer '\? Columns: 'Answer ', 'Question'"):
        parse_row({"Question": "a", "Answer ": "b"}, ("Question", "Answer"))


# -- tokens and loss masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["generation markers", CHATML], ids=["generation markers", "plain template"])
def test_only_assistant_turns_are_trained(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    chosen = tokenizer if template == "generation markers" else another(template)
    tokens = tokenise(Conversation(TWO_TURNS), chosen, "\n")
    assert trained_text(tokens, chosen) == "Eins.<|end|>Zwei.<|end|>"
    whole = chosen.apply_chat_template(list(TWO_TURNS), tokenize=False)
    assert chosen.decode(tokens.ids) == whole.rstrip("\n")  # what stands behind the last end of turn is nobody's


def test_both_ways_to_find_the_turns_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    marked = tokenizer.chat_template
    unmarked = another(marked.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    for row in generate_pairs(20, 3):
        example = parse_row(row)
        assert tokenise(example, tokenizer, "\n") == tokenise(example, unmarked, "\n")


def test_template_that_rewrites_the_last_turn() -> None:
    """As reasoning models do: the last turn has what earlier ones have not. Each turn is trained as the last."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m['role'] == 'assistant' %}[think]{% endif %}"
        "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    chosen = another(template)
    parts = [show_sample(tokens, chosen) for tokens in sequences(Conversation(TWO_TURNS), chosen, "\n")]
    begin = "<|system|>Be brief.<|end|><|user|>One?<|end|><|assistant|>"
    assert parts == [
        f"{begin}⟦[think]Eins.<|end|>⟧",
        f"{begin}Eins.<|end|><|user|>Two?<|end|><|assistant|>⟦[think]Zwei.<|end|>⟧",
    ]


def test_template_without_an_end_of_turn() -> None:
    chosen = another(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    first, second = sequences(Conversation(TWO_TURNS), chosen, "\n")  # the later prompt has no end of text in it
    assert (trained_text(first, chosen), trained_text(second, chosen)) == ("Eins.\n<|end|>", "Zwei.\n<|end|>")
    assert "Eins.\nuser: Two?" in chosen.decode(second.ids)


def test_markers_that_leave_the_end_of_turn_out() -> None:
    chosen = another(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    )
    tokens = tokenise(Conversation(TWO_TURNS), chosen, "\n")
    assert trained_text(tokens, chosen) == "Eins.<|end|>Zwei.<|end|>"


def test_template_that_hides_the_turns() -> None:
    hiding = another(
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    with pytest.raises(ValueError, match="does not show where message 2 .assistant. stands"):
        tokenise(Pair("Hi", "Ho"), hiding, "\n")


def test_pair_without_a_template() -> None:
    chosen = another(None)
    tokens = tokenise(Pair("Hi", "Ho"), chosen, " => ")
    assert chosen.decode(tokens.ids) == "Hi => Ho<|end|>"
    assert trained_text(tokens, chosen) == "Ho<|end|>"
    assert show_sample(tokens, chosen) == "Hi => ⟦Ho<|end|>⟧"
    with pytest.raises(ValueError, match="has no chat template"):
        tokenise(Conversation(TWO_TURNS), chosen, "\n")


def test_plain_text_is_trained_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenise(PlainText("äöü ⟦"), tokenizer, "\n")
    assert all(tokens.trained)
    assert tokenizer.decode(tokens.ids) == "äöü ⟦<|end|>"


def test_prompts_for_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, reference = prompt_and_reference(Conversation(TWO_TURNS), tokenizer, "\n")
    whole = tokenise(Conversation(TWO_TURNS), tokenizer, "\n").ids
    assert whole[: len(ids)] == ids
    assert reference == "Zwei."
    ids, reference = prompt_and_reference(Pair("Hi", "Ho"), another(None), "\n")
    assert (tokenizer.decode(ids), reference) == ("Hi\n", "Ho")
    with pytest.raises(ValueError, match="use metric perplexity"):
        prompt_and_reference(PlainText("x"), tokenizer, "\n")


# -- sources -----------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    return path


PAIRS = [{"prompt": f"count {n}", "completion": f"number {n}"} for n in range(5)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_and_slices(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", PAIRS)
    assert list(load_rows(str(path), "train")) == PAIRS
    sliced = load_rows(f"{path}[1:3]", "train")
    assert list(sliced) == PAIRS[1:3]
    line = {".json": " (line 1)", ".csv": " (line 3)"}.get(suffix, "")
    assert sliced.where(0) == f"{path}, row 2{line}"
    assert len(load_rows(f"{path}[3:]", "train")) == 2


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_tables_of_spreadsheets(tmp_path: Path, mark: str) -> None:
    """A byte order mark, marks of the other kinds in cells, and quotes."""
    path = tmp_path / "rows.csv"
    text = f'question{mark}answer\n"a, b; c\td"{mark}x\n"Grüße ""e"" {mark}"{mark}y\n'
    path.write_text(text, encoding="utf-8-sig")
    rows = [("a, b; c\td", "x"), (f'Grüße "e" {mark}', "y")]
    assert [(row["question"], row["answer"]) for row in load_rows(str(path), "train")] == rows
    path.write_text(text, encoding="cp1252")
    with pytest.raises(ValueError, match=r"rows\.csv, line 3 is not UTF-8 text .*save the file as UTF-8"):
        load_rows(str(path), "train")


def test_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIRS[:3])
    write(tmp_path / "validation.jsonl", PAIRS[3:])
    assert list(load_rows(str(tmp_path), "train")) == PAIRS[:3]
    assert list(load_rows(str(tmp_path), "eval")) == PAIRS[3:]
    assert list(load_rows(f"{tmp_path}:validation[1:]", "train")) == PAIRS[4:]
    with pytest.raises(ValueError, match="has no split 'test': write .*:SPLIT with one of train, validation"):
        load_rows(f"{tmp_path}:test", "eval")


def test_rejects_sources(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", PAIRS)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    (tmp_path / "list.jsonl").write_text('{"prompt": "a", "completion": "b"}\n[1]\n')
    for name, message in (
        ("row.jsonl", "no such file or folder. Did you mean .*rows.jsonl"),
        ("empty.jsonl", "is empty"),
        ("rows.txt", "files end in .jsonl, .json, .csv, .parquet; this one in '.txt'"),
        ("bad.jsonl", "bad.jsonl, row 2 is not JSON"),
        ("list.jsonl", "list.jsonl, row 2 is not a JSON object but list"),
        ("rows.jsonl[5:]", "no rows from 5 to 5; there are 5"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(str(tmp_path / name), "train")
    with pytest.raises(ValueError, match="could not be loaded from this folder or the hub"):
        load_rows("nobody/nothing", "train")
    with pytest.raises(ValueError, match="the built-in task is builtin:sql"):
        load_rows("builtin:sqll", "train")


# -- token sets --------------------------------------------------------------------------------------------------


def test_prepared_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", PAIRS)
    data = prepare(str(path), "train", tokenizer, DataSettings())
    assert len(data) == 5
    expected = tokenise(Pair("count 3", "number 3"), tokenizer, "\n")
    assert data.tokens(3) == expected
    assert data.lengths[3] == len(expected.ids)
    assert data.trained[3] == sum(expected.trained) == len("number 3") + 1


def test_prepared_rows_follow_the_settings(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(write(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "p" * 50, "completion": "c"}]))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 6 has 55 tokens, data.max_length is 30 \(1 of 6 rows"):
        prepare(path, "train", tokenizer, DataSettings(max_length=30))
    dropped = prepare(path, "train", tokenizer, DataSettings(max_length=30, too_long="drop"))
    assert (len(dropped), dropped.dropped) == (5, "1 dropped, longer than 30 tokens")
    cut = prepare(path, "train", tokenizer, DataSettings(max_length=15, too_long="truncate"))
    assert (len(cut), cut.dropped) == (5, "6 cut to 15 tokens, 1 dropped, no trained token")
    assert cut.lengths.max() == 15


@pytest.mark.parametrize("builtin", [False, True])
def test_rows_are_tokenised_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, builtin: bool
) -> None:
    source = "builtin:sql[:8]" if builtin else str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    first = prepare(source, "train", tokenizer, DataSettings())
    monkeypatch.setattr("rosa_ds.data.prepare.sequences", None)
    assert prepare(source, "train", tokenizer, DataSettings()).digest() == first.digest()
    with pytest.raises(TypeError):
        prepare(source, "train", tokenizer, DataSettings(separator="; "))


def test_prepare_names_file_and_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "", "completion": "c"}])
    with pytest.raises(ValueError, match="rows.jsonl, row 6: 'prompt' is a text that is not empty"):
        prepare(f"{path}[2:]", "train", tokenizer, DataSettings())
    with pytest.raises(ValueError, match="no token is trained"):
        prepare(f"{path}[:5]", "train", tokenizer, DataSettings(max_length=4, too_long="truncate"))


def test_everything_trained_is_an_error_for_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PAIRS)
    greedy = another(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="every token is trained"):
        prepare(str(path), "train", greedy, DataSettings())


# -- several processes -------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> str:
    """Rows enough for three processes."""
    return str(write(tmp_path / "many.jsonl", [{"prompt": f"{n}?", "completion": f"{n + 1}"} for n in range(1100)]))


def test_any_number_of_workers_makes_the_same_examples(
    many: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, environ = [], os.environ
    for workers in (1, 2, 8):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / str(workers))
        data = prepare(many, "train", tokenizer, DataSettings(workers=workers))
        made.append([data.tokens(index) for index in range(1100)])
    assert made[0] == made[1] == made[2]
    assert os.environ is environ  # which others hold
    assert "TOKENIZERS_PARALLELISM" not in environ
    files = sorted(path.name.partition("_")[2] for path in (tmp_path / "8").glob("rosa-*_of_*.arrow"))
    assert files == [f"{number:05d}_of_00003.arrow" for number in range(3)]
    monkeypatch.setattr("rosa_ds.data.prepare.sequences", None)  # nothing is tokenised again
    assert prepare(many, "train", tokenizer, DataSettings(workers=1)).digest() == data.digest()


def test_a_worker_names_the_row_that_is_wrong(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n}?", "completion": "x"} for n in range(1100)]
    rows[700] = {"prompt": "a", "completion": ["b"]}
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 701: "):
        prepare(str(write(tmp_path / "rows.jsonl", rows)), "train", tokenizer, DataSettings(workers=2))


def test_a_worker_that_is_killed_is_told(
    many: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("rosa_ds.data.prepare.sequences", end)
    with pytest.raises(
        RunError, match=r"one of 2 processes that tokenise was ended from outside .*: set data\.workers"
    ):
        prepare(many, "train", tokenizer, DataSettings(workers=2, separator=";"))


def test_workers_are_the_cores_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert worker_count(DataSettings()) == 16
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert worker_count(DataSettings()) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert worker_count(DataSettings()) == 1
    assert worker_count(DataSettings(workers=5)) == 5


def test_prepare_leaves_what_training_takes(
    many: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "rosa_ds"):
        dispatch(["prepare", "--data.train", many, "--data.eval", f"{many}[:8]", "--data.separator", " "])
    assert "1100 examples" in caplog.text
    assert f"kept for training in {datasets.config.HF_DATASETS_CACHE}" in caplog.text
    monkeypatch.setattr("rosa_ds.data.prepare.sequences", None)
    settings = build_config({"data": {"train": many, "eval": f"{many}[:8]", "separator": " "}})
    _, data, evaluation = prepare_data(settings, tokenizer)
    assert evaluation is not None
    assert (len(data), len(evaluation)) == (1100, 8)


# -- batches -----------------------------------------------------------------------------------------------------


def plan(world: int, micro: int, batching: Batching = "sorted", count: int = 37) -> BatchPlan:
    lengths = np.random.default_rng(0).integers(3, 90, count)
    parts = (Part("rows", 0, count, count),)
    return BatchPlan(lengths, np.arange(count + 1), parts, 16, micro, world, seed=3, batching=batching)


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (1, 4), (2, 4), (4, 2), (4, 4), (3, 6), (3, 3), (24, 1)])
def test_every_split_has_the_same_examples(world: int, micro: int) -> None:
    one = plan(1, 16)
    split = plan(world, micro)
    for step in range(7):
        batches = [batch for rank in range(world) for batch in split.micro_batches(step, rank)]
        assert len(batches) == world * split.accumulation_steps
        assert all(len(batch) == micro for batch in batches)
        parts = np.concatenate(batches)
        assert len(parts) - 16 < world * micro
        chosen = one.step_sequences(step)
        assert sorted(parts) == sorted([*chosen, *[-1] * (len(parts) - len(chosen))])


def test_each_example_once_an_epoch() -> None:
    batches = plan(1, 16)
    assert batches.steps_per_epoch == 3
    for epoch in range(2):
        seen = np.concatenate([batches.step_sequences(3 * epoch + step) for step in range(3)])
        assert sorted(seen) == list(range(37))
    parts = batches.parts
    assert not np.array_equal(epoch_order(parts, 3, 0), epoch_order(parts, 3, 1))
    assert not np.array_equal(epoch_order(parts, 3, 0), epoch_order(parts, 4, 0))


def test_sorting_groups_similar_lengths_and_keeps_the_step() -> None:
    by_length, drawn = plan(1, 4), plan(1, 4, "random")
    assert sorted(by_length.step_sequences(0)) == sorted(drawn.step_sequences(0))
    assert list(drawn.step_sequences(0)) == list(epoch_order(by_length.parts, 3, 0)[:16])
    lengths = by_length.lengths[by_length.step_sequences(0)]
    assert list(lengths) == sorted(lengths, reverse=True)


def test_digest_tells_data_apart(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    digests = set()
    for word in ("count", "qount"):
        rows = [{"prompt": f"{word} {n}", "completion": f"number {n}"} for n in range(5)]
        path = write(tmp_path / f"{word}.jsonl", rows)
        digests |= {prepare(str(path), "train", tokenizer, DataSettings()).digest() for _ in range(2)}
    assert len(digests) == 2


def test_collate_pads_and_keeps_positions_with_a_target() -> None:
    first = Tokens([5, 6, 7, 8], [False, False, True, True])
    second = Tokens([9, 4], [False, True])
    batch = collate([first, second], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.kept.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[IGNORE, 7, 8], [4, IGNORE, IGNORE]]
    assert batch.trained_tokens == 3


def test_rows_that_stand_in(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare(str(write(tmp_path / "rows.jsonl", PAIRS)), "train", tokenizer, DataSettings())
    batch = data.batch([-1, -1], 0)
    assert batch.trained_tokens == 0
    assert batch.attention_mask.all()
    assert batch.kept.tolist() == [0]


# -- generated text ----------------------------------------------------------------------------------------------


def test_generated_pairs() -> None:
    assert generate_pairs(30, 1)[:10] == generate_pairs(10, 1)
    assert generate_pairs(10, 1) != generate_pairs(10, 2)
    train = [json.dumps(row) for row in load_rows("builtin:sql", "train")]
    held_out = [json.dumps(row) for row in load_rows("builtin:sql", "eval")]
    assert (len(train), len(held_out)) == (1600, 200)
    assert not set(train).intersection(held_out)


def test_no_query_in_the_pretraining_corpus() -> None:
    stream = generate_conversations(0)
    texts = [set(message["content"].split()) for _ in range(3000) for message in next(stream)]
    assert not any({"SELECT", "FROM"} <= words for words in texts)


@pytest.mark.data
def test_real_files(tokenizer: PreTrainedTokenizerBase) -> None:
    folder = Path(os.environ.get("ROSA_DS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ROSA_DS_DATA")
    settings = DataSettings(max_length=4096)
    sql = prepare(f"{folder}/sql_train.jsonl[:700]", "train", tokenizer, settings)
    maths = prepare(f"{folder}/gsm8k_test200.jsonl", "eval", tokenizer, settings)
    named = settings.model_copy(update={"prompt_column": "mr", "completion_column": "ref"})
    e2e = prepare(f"{folder}/e2e_dev.csv[:50]", "train", tokenizer, named)
    assert [len(sql), len(maths), len(e2e)] == [700, 200, 50]
    batch = sql.batch([0, 1], tokenizer.pad_token_id)
    assert isinstance(batch.targets, torch.Tensor)
    assert (
        trained_text(sql.tokens(0), tokenizer)
        == "SELECT route_via FROM table_29202276_2 WHERE train_name = 'Parasuram Express'<|end|>"
    )
