"""Settings: from a command line and a DeepSpeed file to one typed tree, and what is refused."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from rosa_ds.config.command_line import build_config, parse_command_line
from rosa_ds.config.deepspeed import keep_batch, plan_deepspeed, resolve_batch
from rosa_ds.config.schema import AdapterConfig, RunConfig, setting_names
from rosa_ds.config.unused import settings_without_effect

CONFIGS = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def plan(deepspeed: dict[str, Any], world: int = 1, **settings: Any) -> Any:
    return plan_deepspeed(deepspeed, RunConfig(**settings), world, gpu_has_bfloat16=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_shipped_file_is_valid(path: Path, world: int) -> None:
    command = parse_command_line(["--config", str(path)])
    made, _ = plan_deepspeed(command.deepspeed, command.config, world, gpu_has_bfloat16=True)
    assert made.stage == int(path.stem.removeprefix("zero")[0])
    assert made.dtype == "bfloat16"
    assert made.config["train_batch_size"] == made.micro_batch_size * made.accumulation_steps * world == 16
    assert "auto" not in json.dumps(made.config)


def test_the_section_and_overrides_meet(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", {"train_batch_size": 8, "rosa": {"adapter": {"rank": 3, "density": 0.5}}})
    command = parse_command_line(
        ["--local_rank=1", "--config", path, "--adapter.rank", "5", "--ds.zero_optimization.stage", "2", "--resume"]
    )
    assert (command.config.adapter.rank, command.config.adapter.density) == (5, 0.5)
    assert command.deepspeed == {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    assert command.resume == ""
    assert settings_without_effect(command.config) == []


def test_values_of_every_kind() -> None:
    command = parse_command_line(
        [
            *("--adapter.target_modules", "q_proj,k_proj", "--adapter.rank_pattern", '{"q_proj": 2}'),
            *("--training.max_steps", "none", "--training.tensorboard", "true", "--adapter.low_rank_lr=1e-3"),
            *("--resume", "runs/x", "--data.separator", " "),
        ]
    )
    config = command.config
    assert config.adapter.target_modules == ["q_proj", "k_proj"]
    assert config.adapter.rank_pattern == {"q_proj": 2}
    assert (config.training.max_steps, config.training.tensorboard) == (None, True)
    assert config.adapter.low_rank_lr == 1e-3
    assert command.resume == "runs/x"
    assert config.data.separator == " "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, k_proj", ["q_proj", "k_proj"]),
        ("[q_proj,k_proj]", ["q_proj", "k_proj"]),
        ('["q_proj","k_proj"]', ["q_proj", "k_proj"]),
        (r'[".*\\.(q|v)_proj"]', [r".*\.(q|v)_proj"]),
        (r".*layers\.[0-9]{1,2}\..*(q,v)_proj,o_proj", [r".*layers\.[0-9]{1,2}\..*(q,v)_proj", "o_proj"]),
        (r'["é","a\"b","c,d"]', ["é", 'a"b', "c,d"]),
        ("[]", []),
    ],
    ids=["one", "two", "brackets", "json", "escape", "expression", "quotes", "none"],
)
def test_a_list_is_json_or_has_commas(text: str, expected: list[str]) -> None:
    assert parse_command_line(["--adapter.modules_to_save", text]).config.adapter.modules_to_save == expected


def test_of_a_setting_given_twice_the_last_counts() -> None:
    twice = parse_command_line(["--data.train", "a.jsonl", "--data.eval", "b.jsonl", "--data.train", "c.jsonl"]).config
    assert (twice.data.train, twice.data.eval) == ("c.jsonl", "b.jsonl")
    assert parse_command_line(["--data.eval", "none"]).config.data.eval is None
    several = parse_command_line(["--data.train", '["a.jsonl", {"source": "b.jsonl", "examples": 3}]']).config
    assert [(source.source, source.examples) for source in several.data.mixture] == [("a.jsonl", None), ("b.jsonl", 3)]


def test_a_list_that_is_no_json_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--adapter.target_modules .* is no JSON list: .*a backslash is written twice"
    ):
        parse_command_line(["--adapter.target_modules", r'[".*\.q_proj"]'])


def choices() -> Iterator[tuple[str, Any]]:
    """Every setting that is one of some words, with each of them."""
    for name in setting_names():
        kind: Any = RunConfig
        for part in name.split("."):
            kind = kind.model_fields[part].annotation
        if get_origin(kind) is Literal:
            yield from ((name, choice) for choice in get_args(kind))


@pytest.mark.parametrize(("name", "choice"), list(choices()))
def test_every_choice_can_be_given(name: str, choice: str) -> None:
    config: Any = parse_command_line([f"--{name}", choice]).config
    assert operator.attrgetter(name)(config) == choice


@pytest.mark.parametrize("text", ["\n\n", "a\nb", "-1", "-a b", " a ", "[a", 'a"b', "a,b", "{a}"])
def test_a_text_arrives_as_it_was_given(text: str) -> None:
    assert parse_command_line([f"--data.separator={text}"]).config.data.separator == text


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("method", "lora")
    monkeypatch.setenv("METHOD", "lora")
    assert build_config({}).method == "robust"


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in setting_names():
        assert f"--{name}" in text
    assert "Share of each matrix's entries that the sparse part trains (0.006 = 0.6 %). (default: 0.006)" in text
    assert "--resume [PATH]" in text


def test_resolved_configuration_round_trips() -> None:
    config = build_config({"adapter": {"rank": 3}, "mask": {"after": "continue"}})
    assert RunConfig(**json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter.rnk", "4"], "unknown setting --adapter.rnk. Did you mean adapter.rank"),
        (["--rank", "4"], "Did you mean adapter.rank"),
        (["--adapter.rank", "x"], "adapter.rank: input should be a valid integer.*given 'x'"),
        (["--adapter.rank", "-1"], "adapter.rank: input should be greater than or equal to 0"),
        (["--adapter.rank"], "--adapter.rank needs a value"),
        (
            ["--method", "rosa"],
            "method: input should be 'full', 'lora', 'sparse', 'robust', 'subspace' or 'robust-subspace', given 'rosa'",
        ),
        (["train.jsonl"], "unexpected argument 'train.jsonl'"),
        (["--config", "/nowhere/zero2.json"], "no such file"),
        (["--adapter.rank", "0"], "adapter.rank is 0, but method robust trains a low-rank part"),
        (["--adapter.density", "0", "--method", "sparse"], "adapter.density is 0, but method sparse"),
        (["--method", "full", "--adapter.modules_to_save", "norm"], "modules_to_save has no meaning with method full"),
        (["--data.separator", "-\n-"], "a text that begins with - and has a line break"),
        (["--data.prompt_column", "a"], "belong together: give both or neither"),
        (["--data.completion_column", "a"], "belong together: give both or neither"),
        (["--data.prompt_template", "{a}"], "data.prompt_template and data.completion_column belong together"),
        (["--data.prompt_template", "{a}", "--data.prompt_column", "b"], "both say what the prompt is"),
        (["--adapter", "3"], "a section is an object of settings|error parsing CLI"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rejects_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command_line(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rosa": {"adapter": {"dnsity": 1}}}, "unknown setting adapter.dnsity. Did you mean adapter.density"),
        ({"rosa": {"mask": 3}}, "a section is an object of settings, given 3"),
        ({"rosa": 3}, 'the section "rosa" is a JSON object, given 3'),
        ("[1]", "expected is a JSON object, given list: give a DeepSpeed JSON file"),
        ("{", "not JSON"),
    ],
    ids=["unknown", "section", "rosa", "list", "syntax"],
)
def test_rejects_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command_line(["--config", write(tmp_path / "ds.json", content)])


def test_our_settings_under_the_wrong_name() -> None:
    with pytest.raises(ValueError, match="given without it: --adapter.rank"):
        parse_command_line(["--ds.rosa.adapter.rank", "3"])


def test_override_of_something_that_is_no_section(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", {"train_batch_size": 8})
    with pytest.raises(ValueError, match="train_batch_size is not a section"):
        parse_command_line(["--config", path, "--ds.train_batch_size.x", "1"])


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        ((None, None, None), 1, (16, 8, 2)),
        ((None, None, None), 2, (16, 8, 1)),
        ((None, None, None), 256, (256, 1, 1)),
        ((32, "auto", "auto"), 4, (32, 8, 1)),
        ((28, "auto", "auto"), 2, (28, 7, 2)),
        ((None, 4, None), 2, (8, 4, 1)),
        ((None, 4, 3), 2, (24, 4, 3)),
        ((24, None, 3), 2, (24, 4, 3)),
        ((24, 4, "auto"), 2, (24, 4, 3)),
        ((15, None, None), 2, (15, 8, 1)),
        ((26, None, None), 2, (26, 7, 2)),  # 13 a rank: not 13 micro-batches of 1
        ((16, 8, None), 4, (16, 4, 1)),
        ((20, 8, None), 2, (20, 5, 2)),
        ((16, None, None), 24, (16, 1, 1)),
        ((17, None, 2), 4, (17, 3, 2)),
        ((10, None, 4), 2, (10, 2, 3)),
    ],
)
def test_batch_sizes(given: tuple[Any, ...], world: int, expected: tuple[int, int, int]) -> None:
    """Examples of a step, micro-batch, accumulation steps; less than a micro-batch of each rank stays empty."""
    assert expected[0] <= expected[1] * expected[2] * world < expected[0] + expected[1] * world
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert resolve_batch({key: value for key, value in zip(keys, given, strict=True) if value}, world) == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, (16, 6, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, (16, 3, 2)),
        # what the user wants is left: the checkpoint will say no
        ({"gradient_accumulation_steps": 2}, (6, 1, 2)),
        ({"train_batch_size": 12}, (12, 4, 1)),
    ],
)
def test_a_resumed_run_keeps_its_batch(given: dict[str, Any], kept: tuple[int, int, int]) -> None:
    """On 3 ranks, of a run with 16 examples a step."""
    plan, _ = plan_deepspeed(given, RunConfig(), 3, gpu_has_bfloat16=False)
    found = keep_batch(plan, given, 16)
    assert (found.batch_size, found.micro_batch_size, found.accumulation_steps) == kept
    assert found.config["train_batch_size"] == kept[1] * kept[2] * 3
    assert f"a step: {kept[0]} examples, {kept[1] * kept[2] * 3} places (3 ranks" in found.step()


@pytest.mark.parametrize(
    ("deepspeed", "world", "message"),
    [
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 3},
            2,
            "is not train_micro_batch_size_per_gpu ×",
        ),
        ({"train_batch_size": 0}, 1, "is a whole number of 1 or more"),
        ({"scheduler": "WarmupLR"}, 1, "scheduler"),
        ({"zero_optimization": {"stage": 4}}, 1, "stage 4: supported are"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 1, "cpu_offload True is not supported: remove it"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, 1, "mics_shard_size 2 is not supported"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            1,
            "offload_param to 'nvme' at stage 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            1,
            "offload_optimizer to 'cpu' at stage 2: only stage 3 offloads",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, 1, "choose one"),
        ({"fp16": {"enabled": True}}, 1, "float16 at stage 0.*stage 1"),
        ({"bf16": True}, 1, "is a section such as"),
        ({"gradient_acumulation_steps": 2}, 1, "Did you mean gradient_accumulation_steps"),
        ({"scheduler": {"type": "OneCycle"}}, 1, "scheduler 'OneCycle' of the DeepSpeed file is not one of"),
        (
            {"optimizer": {"params": {}}},
            1,
            "optimizer type None of the DeepSpeed file is not supported: Adam, AdamW, ",
        ),
        ({"optimizer": {"type": "Lion"}}, 1, "optimizer type 'Lion'"),
        (
            {"optimizer": {"type": "Adam", "params": {"beta": 1}}},
            1,
            "optimizer.params.beta of the DeepSpeed file is not known",
        ),
        ({"curriculum_learning": {"enabled": True}}, 1, "'curriculum_learning' of the DeepSpeed file is not supported"),
        ({"torch_autocast": {"enabled": True}}, 1, "'torch_autocast' of the DeepSpeed file is not supported"),
        ({"wall_clock_breakdown": "auto"}, 1, "cannot be resolved"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects_deepspeed_settings(deepspeed: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(deepspeed, world)


def test_rejects_types_that_disagree() -> None:
    with pytest.raises(ValueError, match="model.dtype float32 but the DeepSpeed file enables bfloat16"):
        plan({"bf16": {"enabled": True}}, model={"dtype": "float32"})
    with pytest.raises(ValueError, match="sets it to enabled: false"):
        plan({"bf16": {"enabled": False}}, model={"dtype": "bfloat16"})
    made, _ = plan({"bf16": None, "fp16": None}, model={"dtype": "bfloat16"})  # null: as if it were not there
    assert made.config["bf16"] == {"enabled": True}
    assert "fp16" not in made.config


def test_a_file_of_another_trainer() -> None:
    """What users bring: every "auto" that the Hugging Face integration fills in."""
    given = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    before = json.dumps(given)
    made, settings = plan(given, training={"weight_decay": 0.1})
    assert json.dumps(given) == before
    assert "auto" not in json.dumps(made.config)
    assert made.config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (made.optimizer.name, made.optimizer.arguments) == ("AdamW", {"betas": (0.9, 0.95), "weight_decay": 0.1})
    assert made.record() == {
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
    }
    assert settings.model.dtype == "float32"
    assert (settings.training.scheduler, settings.training.warmup_steps) == ("linear", 7)
    assert made.config["gradient_clipping"] == 1.0
    assert made.dtype == "float32"


def test_what_the_file_says_of_training(caplog: pytest.LogCaptureFixture) -> None:
    """One rule: the file's value is taken, and a setting that says otherwise is an error."""
    adam = {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.01, "adam_w_mode": False, "torch_adam": True}}
    warmup = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 7, "cos_min_ratio": 0.1}}
    made, settings = plan({"optimizer": adam, "scheduler": warmup}, method="full")
    assert (made.optimizer.name, made.optimizer.arguments) == ("Adam", {"weight_decay": 0.01})
    training = settings.training
    assert (training.learning_rate, training.weight_decay) == (3e-5, 0.01)
    assert (training.scheduler, training.warmup_steps) == ("cosine", 7)
    assert "scheduler.params.cos_min_ratio" in caplog.text
    assert "gradient_clipping" not in made.config
    for name, value in (("learning_rate", 1e-4), ("weight_decay", 0.1), ("warmup_steps", 3), ("scheduler", "linear")):
        with pytest.raises(ValueError, match=f"training.{name} .*remove one of the two"):
            plan({"optimizer": adam, "scheduler": warmup}, training={name: value})
    plan({"optimizer": adam}, training={"learning_rate": 3e-5})


def test_settings_without_effect_are_named() -> None:
    config = RunConfig(
        method="lora", adapter={"density": 0.1}, mask={"steps": 2}, training={"max_steps": 3, "epochs": 2}
    )
    assert [text.split(" ")[0] for text in settings_without_effect(config)] == [
        "adapter.density",
        "mask.steps",
        "training.epochs",
    ]
    random = RunConfig(mask={"score": "random", "warmup_steps": 3})
    assert settings_without_effect(random) == ["mask.warmup_steps (mask.score random needs no gradient)"]
    assert not random.collects_gradients
    loaded = RunConfig(mask={"load": "mask.safetensors", "score": "magnitude"})
    assert settings_without_effect(loaded) == ["mask.score (the mask is loaded)"]
    sparse = RunConfig(method="sparse", mask={"warmup_steps": 3})
    assert settings_without_effect(sparse) == ["mask.warmup_steps (method sparse has no low-rank part to warm up)"]
    drawn = RunConfig(
        method="subspace",
        adapter={"alpha": 3.0, "density": 0.1},
        draw={"every": "never", "directions": "projection", "factorization": "svd", "moments": "keep"},
    )
    assert [text.split(" ")[0] for text in settings_without_effect(drawn)] == [
        "adapter.alpha",
        "adapter.density",
        "draw.factorization",
        "draw.moments",
    ]
    assert settings_without_effect(RunConfig(draw={"residual": False})) == [
        "draw.residual (method robust draws nothing)"
    ]


def test_adapter_config_is_strict() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        AdapterConfig(ranks=3)
