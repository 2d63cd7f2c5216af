"""Whole runs against each other and against plain PyTorch; each launcher starts one at least, the others are forked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosa_ds
from launching import ROOT, SMALL, TRAIN, kill, losses, metrics, run, start, wait_for_step
from rosa_ds.adapters.folder import open_adapter
from rosa_ds.checkpoints import checkpoint
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import DataSettings, ModelSettings, RunConfig
from rosa_ds.data.batches import IGNORE, Batch, BatchPlan
from rosa_ds.data.prepare import prepare
from rosa_ds.export.adapted import load_adapted
from rosa_ds.export.merge import export_adapter, export_merged
from rosa_ds.export.verify import verify
from rosa_ds.models.load import TINY_FOLDER, identify, load_model, load_tokenizer
from rosa_ds.training.init_adapter import begin_from
from rosa_ds.training.schedule import lr_factor

pytestmark = pytest.mark.ranks

FAST = (*SMALL, "--training.warmup_steps", "2", "--adapter.rank", "4", "--adapter.density", "0.01")
PHASES = ("--mask.warmup_steps", "2", "--mask.steps", "2", "--training.max_steps", "4", "--training.save_steps", "1")
KEEP = ("--training.keep_checkpoints", "20", "--adapter.dropout", "0.1")


def zero(stage: int | str) -> tuple[str, str]:
    return "--config", str(ROOT / "ds_configs" / f"zero{stage}.json")


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of all phases: 2 ranks, ZeRO-2, float32, with dropout."""
    folder = tmp_path_factory.mktemp("straight")
    run("deepspeed", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, cwd=folder)
    return folder / "runs" / "default"


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    lines = metrics(straight)
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["phase"] for line in steps] == ["warmup"] * 2 + ["collect"] * 2 + ["train"] * 4
    fields = {"step", "epoch", "phase", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds"}
    assert all(line.keys() == fields | {"peak_memory_bytes", "trained_tokens"} for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)
    # a restart begins again: same batch, same initial numbers, same loss
    assert steps[4]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-2)
    evaluations = [line["loss"] for line in lines if line.get("event") == "eval"]
    assert evaluations[-1] < evaluations[0]
    assert json.loads((straight / "config.json").read_text())["adapter"]["rank"] == 4
    assert json.loads((straight / "ds_config.json").read_text())["train_batch_size"] == 16
    assert (straight / "checkpoints" / "latest").read_text() == "step-000008\n"
    account = json.loads((straight / "accounting.json").read_text())
    for part in ("base", "A", "B", "values", "positions", "optimizer"):
        assert account["measured"]["memory"][part] == pytest.approx(account["predicted"]["memory"][part], rel=0.02), (
            part
        )
    reduced = account["measured"]["traffic"]["all_reduce float32"]  # and the gradient's norm
    assert reduced == pytest.approx(account["predicted"]["traffic"]["gradients"], rel=1e-3)
    mask = load_file(straight / "mask.safetensors")
    assert len(mask) == 42
    adapter = open_adapter(straight / "adapter")
    assert adapter.description.stop_tokens == (load_tokenizer(ModelSettings()).eos_token_id,)
    assert len(adapter.positions) == 42
    assert all(torch.equal(adapter.positions[name], positions) for name, positions in mask.items())
    assert all(tensor.dtype == torch.float32 for tensor in adapter.trained.values())


@pytest.mark.parametrize(
    "step", [1, 3, 4, 6], ids=["in warm-up", "between collect steps", "at the restart", "in training"]
)
def test_resume_is_bit_equal(straight: Path, tmp_path: Path, step: int) -> None:
    copy = tmp_path / "runs" / "default"
    shutil.copytree(straight, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(copy / "adapter")
    output = run("fork", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, "--resume", cwd=tmp_path)
    assert f"step {step}" in output
    assert losses(copy) == losses(straight)
    assert (copy / "mask.safetensors").read_bytes() == (straight / "mask.safetensors").read_bytes()
    assert (copy / "adapter" / "adapter_model.safetensors").read_bytes() == (
        straight / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_killed_run_ends_as_the_uninterrupted_one(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "default"
    process = start("deepspeed", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, cwd=tmp_path)
    wait_for_step(process, folder, 5)
    kill(process)
    assert len([line for line in metrics(folder) if "event" not in line]) < 8
    run("fork", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, "--resume", cwd=tmp_path)
    assert losses(folder) == losses(straight)


def test_resume_names_what_changed(straight: Path, tmp_path: Path) -> None:
    given = (*zero(2), *FAST, *PHASES, "--training.output_dir", str(straight), "--resume")
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    for change, message in (
        (("--adapter.dropout", "0.2"), "--resume: adapter.dropout was 0.1 and is 0.2 now"),
        (
            ("--adapter.dropout", "0.1", "--ds.optimizer.type", "AdamW", "--ds.optimizer.params.eps", "1e-6"),
            "--resume: deepspeed.optimizer was",
        ),
    ):
        output = run("fork", 2, TRAIN, *given, *change, cwd=tmp_path, status=1)
        assert message in output
        assert "Traceback" not in output
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_resuming_into_another_folder_leaves_the_run_alone(straight: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    source = straight / "checkpoints" / "step-000006"
    run("fork", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, "--resume", str(source), cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    assert losses(folder) == [entry for entry in losses(straight) if entry[0] > 6]
    assert (folder / "mask.safetensors").read_bytes() == (straight / "mask.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "default"
    shutil.copytree(straight, copy)
    damaged = copy / "checkpoints" / "step-000008" / "trained-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    output = run("fork", 2, TRAIN, *zero(2), *FAST, *PHASES, *KEEP, "--resume", cwd=tmp_path)
    assert "step-000008 is damaged (trained-00000.safetensors does not have the hash that was written)" in output
    assert losses(copy) == losses(straight)


PERSIST = "--ds.zero_optimization.stage3_param_persistence_threshold"
REUSE = "--ds.zero_optimization.stage3_max_reuse_distance"
OVERLAP = "--ds.zero_optimization.overlap_comm"
PACKED = ("--data.batching", "tokens")
SPLITS: dict[str, tuple[int, int | str, tuple[str, ...]]] = {
    "1 rank, 4 micro-batches, stage 0": (1, 0, ("--data.batching", "sorted")),
    "2 ranks, 2 micro-batches, stage 1": (2, 1, PACKED),
    "4 ranks, 1 micro-batch, stage 2": (4, 2, ()),
    "2 ranks, stage 2, positions partitioned": (2, 2, ("--adapter.partition_positions", "true", *PACKED)),
    "2 ranks, stage 2, positions partitioned, checkpointing": (
        2,
        2,
        ("--adapter.partition_positions", "true", "--training.gradient_checkpointing", "true"),
    ),
    "1 rank, stage 3": (1, 3, ("--data.batching", "random")),
    "2 ranks, stage 3, DeepSpeed's own persistence": (2, 3, (PERSIST, "100000", *PACKED)),
    "4 ranks, stage 3, nothing persists, no reuse, no overlap": (4, 3, (PERSIST, "0", REUSE, "0", OVERLAP, "false")),
    "2 ranks, stage 3, offload, checkpointing": (
        2,
        "3_offload",
        (PERSIST, "0", "--training.gradient_checkpointing", "true", *PACKED),
    ),
    "2 ranks, stage 3, reentrant checkpointing": (2, 3, ("--training.gradient_checkpointing", "reentrant")),
    "2 ranks, stage 2, DeepSpeed's checkpointing": (2, 2, ("--ds.activation_checkpointing.profile", "true")),
    "2 ranks, stage 3, DeepSpeed's checkpointing, on the host": (
        2,
        3,
        (PERSIST, "0", "--ds.activation_checkpointing.cpu_checkpointing", "true"),
    ),
}
NO_DROPOUT = (*FAST, *PHASES, "--adapter.dropout", "0")


@pytest.fixture(scope="session", params=SPLITS)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    ranks, stage, more = SPLITS[request.param]
    size = ("--ds.train_micro_batch_size_per_gpu", "4")
    run("fork", ranks, TRAIN, *zero(stage), *NO_DROPOUT, *size, *more, cwd=folder)
    return folder / "runs" / "default"


@pytest.fixture(scope="session")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank with a single micro-batch a step, without padding."""
    folder = tmp_path_factory.mktemp("one")
    size = ("--ds.train_micro_batch_size_per_gpu", "16")
    run("fork", 1, TRAIN, *zero(0), *NO_DROPOUT, *size, *PACKED, cwd=folder)
    return folder / "runs" / "default"


def test_losses_do_not_depend_on_the_split(split: Path, one_batch: Path) -> None:
    expected = losses(one_batch)
    actual = losses(split)
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in actual] == pytest.approx([entry[2] for entry in expected], rel=1e-5)


def test_the_mask_does_not_depend_on_the_split(split: Path, one_batch: Path) -> None:
    expected, actual = load_file(one_batch / "mask.safetensors"), load_file(split / "mask.safetensors")
    assert expected.keys() == actual.keys()
    same = total = 0
    for name, positions in expected.items():
        same += len(set(positions.tolist()) & set(actual[name].tolist()))
        total += positions.numel()
    assert same / total >= 0.999


# -- against plain PyTorch -----------------------------------------------------------------------------------------


def reference_losses(model: Any, groups: list[dict[str, Any]], steps: int) -> list[float]:
    """Losses of an ordinary AdamW loop on whole batches, with the run's data order, schedule and clipping."""
    tokenizer = load_tokenizer(ModelSettings())
    data = prepare("builtin:sql[:96]", "train", tokenizer, DataSettings())
    batches = BatchPlan(data.lengths, data.firsts, data.parts, 16, 16, 1, seed=42, batching="sorted")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    result = []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step, steps, 2, "linear")
        batch = data.batch(batches.step_sequences(step), tokenizer.pad_token_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.kept]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        result.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return result


def training_losses(folder: Path) -> list[float]:
    return [loss for _, event, loss in losses(folder) if event == "train"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_equals_peft(tmp_path: Path) -> None:
    arguments = ("--method", "lora", "--adapter.rank", "4", "--adapter.dropout", "0", "--training.max_steps", "6")
    run("fork", 2, TRAIN, *zero(2), *SMALL, *arguments, "--training.warmup_steps", "2", cwd=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names))
    ours = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    rosa_ds.inject(ours, rosa_ds.AdapterConfig(method="lora", rank=4), seed=42)
    for name, layer in rosa_ds.adapted_layers(ours).items():
        model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(layer.A.data)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = reference_losses(model.train(), [{"params": parameters, "lr": 7e-4}], 6)
    assert training_losses(tmp_path / "runs" / "default") == pytest.approx(expected, rel=1e-5)


class DenseRobust(torch.nn.Module):
    """RoSA's layer by its definition: a dense S built by autograd's own scatter."""

    def __init__(self, layer: rosa_ds.adapters.layer.AdaptedLinear, positions: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.A, self.B = layer.weight, layer.A, layer.B
        self.values, self.scale, self.positions = layer.values, layer.scale, positions.long()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sparse = torch.zeros(self.weight.numel()).index_add(0, self.positions, self.values).view_as(self.weight)
        return torch.nn.functional.linear(x, self.weight + sparse + self.scale * self.B @ self.A)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_robust_equals_dense_autograd(tmp_path: Path, stage: int) -> None:
    arguments = ("--adapter.dropout", "0", "--training.max_steps", "6", "--mask.score", "random")
    run("fork", 2, TRAIN, *zero(stage), *FAST, *arguments, cwd=tmp_path)
    mask = load_file(tmp_path / "runs" / "default" / "mask.safetensors")
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method="robust", rank=4, density=0.01), seed=42)
    layers = rosa_ds.adapted_layers(model)
    groups = [
        {"params": [part for layer in layers.values() for part in (layer.A, layer.B)], "lr": 7e-4},
        {"params": [layer.values for layer in layers.values()], "lr": 2e-4},
    ]
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, DenseRobust(layer, mask[f"{name}.weight"]))
    expected = reference_losses(model.train(), groups, 6)
    assert training_losses(tmp_path / "runs" / "default") == pytest.approx(expected, rel=1e-5)


# -- other settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_keeps_float32_masters(tmp_path: Path, stage: int) -> None:
    """Also: mask.after continue, gradient checkpointing, a module trained whole, resume with 16-bit parameters."""
    arguments = (
        *("--model.dtype", "bfloat16", "--mask.after", "continue", "--training.gradient_checkpointing", "true"),
        *(
            "--adapter.modules_to_save",
            "model.norm",
            "--training.learning_rate",
            "1e-3",
            "--training.tensorboard",
            "true",
        ),
        *("--mask.warmup_steps", "1", "--mask.steps", "1", "--training.max_steps", "5", "--training.save_steps", "3"),
    )
    run("fork", 2, TRAIN, *zero(stage), *FAST, *arguments, cwd=tmp_path)
    folder = tmp_path / "runs" / "default"
    assert [line["phase"] for line in metrics(folder) if "phase" in line] == ["warmup", "collect"] + ["train"] * 3
    adapter = open_adapter(folder / "adapter").trained
    assert "model.norm.weight" in adapter
    for part in (".A", ".B", ".values", "model.norm.weight"):
        tensors = [tensor for name, tensor in adapter.items() if name.endswith(part)]
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors), part
    assert list((folder / "tensorboard").iterdir())
    before = losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000005")
    run("fork", 2, TRAIN, *zero(stage), *FAST, *arguments, "--resume", cwd=tmp_path)
    assert losses(folder) == before


def test_a_restart_begins_with_the_base(tmp_path: Path) -> None:
    """Low-rank part, sparse values and modules trained whole are as at the start: the same loss, to the last bit."""
    arguments = (
        "--adapter.modules_to_save",
        "model.norm",
        "--training.learning_rate",
        "0.05",
        "--adapter.dropout",
        "0",
    )
    steps = ("--mask.warmup_steps", "2", "--mask.steps", "1", "--training.max_steps", "2")
    run("fork", 2, TRAIN, *zero(2), *FAST, *arguments, *steps, cwd=tmp_path)
    before_mask, train = (
        training_losses(tmp_path / "runs" / "default")[:3],
        training_losses(tmp_path / "runs" / "default")[3:],
    )
    assert train[0] == before_mask[0]
    assert before_mask[1] != train[1]


def test_sparse_and_full_and_a_loaded_mask(straight: Path, tmp_path: Path) -> None:
    common = ("--training.max_steps", "3", *SMALL)
    run(
        "fork",
        1,
        TRAIN,
        *zero(0),
        *common,
        "--method",
        "full",
        "--training.learning_rate",
        "1e-3",
        "--training.save_steps",
        "2",
        cwd=tmp_path,
    )
    full = tmp_path / "runs" / "default"
    assert losses(full)[-1][2] < losses(full)[0][2]
    before = losses(full)
    shutil.rmtree(full / "checkpoints" / "step-000003")
    again = (*common, "--method", "full", "--training.learning_rate", "1e-3", "--training.save_steps", "2", "--resume")
    run("fork", 1, TRAIN, *zero(0), *again, cwd=tmp_path)
    assert losses(full) == before
    mask = shutil.copy(straight / "mask.safetensors", tmp_path)
    sparse = ("--method", "sparse", "--adapter.density", "0.01", "--mask.load", str(mask), "--mask.steps", "2")
    given = (*sparse, "--training.save_steps", "2")
    output = run("fork", 1, TRAIN, *zero(2), *common, *given, cwd=tmp_path)
    assert "setting without effect: mask.steps (the mask is loaded)" in output
    assert "the run that was in runs/default is in runs/default.1 now" in output
    assert (full / "mask.safetensors").read_bytes() != b""
    loaded, original = load_file(full / "mask.safetensors"), load_file(mask)
    assert all(torch.equal(loaded[name], original[name]) for name in original)
    assert (tmp_path / "runs" / "default.1" / "adapter").is_dir()
    before = losses(full)
    shutil.rmtree(full / "checkpoints" / "step-000003")
    Path(mask).unlink()  # a checkpoint has the positions
    run("fork", 1, TRAIN, *zero(2), *common, *given, "--resume", cwd=tmp_path)
    assert losses(full) == before


def test_mistakes_end_with_one_message(tmp_path: Path) -> None:
    for arguments, message in (
        (("--adapter.target_modules", "q_prj"), "error: adapter.target_modules 'q_prj' matches no module"),
        (("--model.name_or_path", "/nowhere/model"), "error: model.name_or_path /nowhere/model: no such folder"),
        (("--resume",), "error: --resume: runs/default holds no checkpoint"),
        (("--ds.optimizer.type", "Adamm"), "optimizer type 'Adamm' of the DeepSpeed file is not supported"),
        (("--model.dtype", "float16"), "float16 does not train on this device (cpu): use bfloat16 or float32"),
    ):
        output = run("fork", 1, TRAIN, *zero(2), *SMALL, *arguments, cwd=tmp_path, status=1)
        assert message in output
        assert "Traceback" not in output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    output = run("fork", 1, TRAIN, *zero(2), *SMALL, "--training.output_dir", "mine", cwd=tmp_path, status=1)
    assert "error: training.output_dir mine is not empty and holds no run" in output
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


# -- export and evaluation -----------------------------------------------------------------------------------------


def test_export_and_evaluation(straight: Path, tmp_path: Path) -> None:
    export, evaluate = str(ROOT / "launch" / "export.py"), str(ROOT / "launch" / "eval.py")
    output = run("fork", 1, export, str(straight), "out", "--dtype", "float32", "--verify", cwd=tmp_path)
    assert "verification passed" in output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    adapted = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32).eval()
    rosa_ds.load_adapter(adapted, straight / "adapter")
    ids = torch.arange(5, 45)[None]
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    assert load_tokenizer(ModelSettings(name_or_path=str(tmp_path / "out"))).chat_template
    figures = []
    for model in (str(straight), "out"):
        arguments = (model, "--data", "builtin:sql[:16]", "--metric", "perplexity", "--metric", "exact_match")
        run("fork", 1, evaluate, *arguments, "--max-new-tokens", "4", "--output", "eval.json", cwd=tmp_path)
        figures.append(json.loads((tmp_path / "eval.json").read_text()))
    assert figures[0]["loss"] == pytest.approx(losses(straight)[-1][2], rel=1e-4)
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], rel=1e-4)
    assert len(figures[0]["samples"]) == figures[0]["rows"] == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_export_is_seen(straight: Path, tmp_path: Path, dtype: str) -> None:
    """A merge that forgets the sparse part of a single layer does not pass."""
    kind = getattr(torch, dtype)
    export_merged(straight, tmp_path / "out", kind)
    result = verify(straight, tmp_path / "out")
    assert result.passed, str(result)
    layer = load_adapted(open_source(straight), torch.float32).model.layers[0].mlp.up_proj
    layer.mask_known = False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=kind)
    model.model.layers[0].mlp.up_proj.weight.data.copy_(layer.merged_weight())
    model.save_pretrained(tmp_path / "out")
    result = verify(straight, tmp_path / "out")
    assert not result.passed
    assert result.worst_layer == "model.layers.0.mlp.up_proj"


def test_exports_replace_nothing_but_exports(straight: Path, tmp_path: Path) -> None:
    export_adapter(straight, tmp_path / "adapter")
    export_adapter(straight, tmp_path / "adapter")
    load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds notes.txt, which is not an earlier export's"):
        export_adapter(straight, tmp_path / "adapter")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapter_config.json"):
        export_merged(straight, tmp_path / "peft", None)
    with pytest.raises(ValueError, match="are one in the other"):
        export_adapter(straight, straight / "adapter")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no adapter"):
        export_merged(tmp_path / "nothing", tmp_path / "out", None)
    with pytest.raises(ValueError, match="no such folder"):
        export_merged(tmp_path / "nowhere", tmp_path / "out", None)


def test_a_run_begins_with_a_run_a_checkpoint_or_an_adapter(straight: Path) -> None:
    newest = checkpoint.find(straight, "")
    expected = open_source(straight / "adapter").trained
    for folder in (straight, newest, straight / "adapter"):
        settings = RunConfig(adapter={"init_from": str(folder)})
        model = load_model(settings.model, torch.float32)
        settings, start = begin_from(settings, model, identify(settings.model), None)
        assert settings.method == "robust"
        assert start is not None
        assert start.trained.keys() == expected.keys()
        assert all(torch.equal(start.trained[name], tensor) for name, tensor in expected.items())


# -- the distributed mask against dense autograd ---------------------------------------------------------------------


def first_batch() -> Batch:
    tokenizer = load_tokenizer(ModelSettings())
    data = prepare("builtin:sql[:96]", "train", tokenizer, DataSettings())
    batches = BatchPlan(data.lengths, data.firsts, data.parts, 16, 16, 1, seed=42, batching="sorted")
    return data.batch(batches.step_sequences(0), tokenizer.pad_token_id)


@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), ("torchrun", 2), ("deepspeed", 4)])
def test_the_mask_is_that_of_dense_autograd(tmp_path: Path, launcher: str, ranks: int) -> None:
    """The gradient of the whole first step (16 examples in 4 micro-batches) by plain autograd on the plain model."""
    arguments = ("--mask.warmup_steps", "0", "--mask.steps", "1", "--training.max_steps", "1", "--adapter.dropout", "0")
    size = ("--ds.train_micro_batch_size_per_gpu", "4")
    run(launcher, ranks, TRAIN, *zero(2), *FAST, *arguments, *size, cwd=tmp_path)
    mask = load_file(tmp_path / "runs" / "default" / "mask.safetensors")
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32).double()
    batch = first_batch()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.kept]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in mask])
    wrong = total = 0
    for (name, positions), grad in zip(mask.items(), grads, strict=True):
        score = grad.square().flatten()
        expected = score.topk(positions.numel())
        threshold, chosen = float(expected.values.min()), float(score[positions.long()].min())
        assert chosen >= threshold * (1 - 1e-5), name
        wrong += len(set(positions.tolist()) - set(expected.indices.tolist()))
        total += positions.numel()
    assert wrong <= 0.001 * total
