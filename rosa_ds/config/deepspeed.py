"""Turn a user's DeepSpeed JSON into one that ``deepspeed.initialize`` takes and that agrees with our settings.

Refuses what cannot work by the name of its key, before data and model are loaded; resolves ``"auto"``, works out the batch sizes
for the number of ranks, and takes over what this system does itself (learning-rate schedule, optimizer groups). The original
dictionary is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from rosa_ds.config.deepspeed_keys import BATCH_KEYS, STAGE3_NAMES, take_keys
from rosa_ds.config.deepspeed_sections import SECTIONS
from rosa_ds.config.schema import RunConfig
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)
DEFAULT_TRAIN_BATCH_SIZE = 16
MAX_AUTO_MICRO_BATCH_SIZE = 8
SUPPORTED_STAGES = (0, 1, 2, 3)
BITSANDBYTES = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})
_OPTIMIZERS = ("Adam", "AdamW", *sorted(BITSANDBYTES), "DeepSpeedCPUAdam")
_COMPILERS = ("inductor", "aot_eager", "eager")
_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# Other ways to divide, store or gather parameters than masks, checkpoints and draws can read, and what DeepSpeed fails with
# after the model is loaded: option -> the value that changes nothing, and where there is more to say why.
_REFUSED_ZERO: dict[str, tuple[Any, str]] = {
    "zero_quantized_weights": (False, ""),
    "zero_quantized_nontrainable_weights": (False, ""),
    "zero_quantized_gradients": (False, ""),
    "mics_shard_size": (-1, ""),
    "zero_hpz_partition_size": (1, ""),
    "cpu_offload": (False, ""),
    "cpu_offload_param": (False, ""),
    "zenflow": (None, ""),
    "legacy_stage1": (False, "; DeepSpeed has given it up"),
    "compute_grad_norm": (True, "; a step whose gradients are not finite is found by their norm"),
    "stage3_module_granularity_threshold": (
        0,
        "; adapters inside of a module that is gathered as one fail in backward",
    ),
    "stage3_use_all_reduce_for_fetch_params": (
        False,
        "; it gathers parameters of one type only, and positions are integers",
    ),
}
_REFUSED_OFFLOAD = {"ratio": (1.0, ""), "super_offload": (False, "")}


@dataclasses.dataclass(frozen=True)
class DeepSpeedPlan:
    """``config`` goes to ``deepspeed.initialize``; the rest is what our own code needs of it.

    ``batch_size`` examples a step fill ``micro_batch_size · accumulation_steps · ranks`` places, which is what DeepSpeed
    calls ``train_batch_size``; places that are left over hold rows without trained tokens.
    """

    config: dict[str, Any]
    optimizer: OptimizerChoice
    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    dtype: str
    stage: int
    compiler: str | None = None
    """Backend of torch.compile for the model; ``None``: it runs as it is."""

    @property
    def ranks(self) -> int:
        places: int = self.config["train_batch_size"]
        return places // (self.micro_batch_size * self.accumulation_steps)

    def step(self) -> str:
        """In words: ``a step: 16 examples, 18 places (3 ranks × 1 micro-batches × 6)``."""
        places = f"{self.ranks} ranks × {self.accumulation_steps} micro-batches × {self.micro_batch_size}"
        shape = f"{self.config['train_batch_size']} places ({places})"
        return f"a step: {self.batch_size} examples, {shape}"

    def record(self) -> dict[str, Any]:
        """What decides the numbers of a run beside our settings: compared when it is resumed."""
        optimizer = {"type": self.optimizer.name, "params": dict(self.optimizer.arguments)}
        return {
            "optimizer": json.loads(json.dumps(optimizer)),
            "gradient_clipping": self.config.get("gradient_clipping", 0.0),
        }


@dataclasses.dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer's name and arguments without the learning rate, e.g. ``("AdamW", {"eps": 1e-8})``."""

    name: str
    arguments: dict[str, Any]


def plan_deepspeed(
    config: dict[str, Any], settings: RunConfig, world_size: int, gpu_has_bfloat16: bool
) -> tuple[DeepSpeedPlan, RunConfig]:
    """Resolve a DeepSpeed configuration for this run.

    Args:
        config: the user's DeepSpeed JSON, without the section ``"rosa"``.
        settings: our settings; the returned copy has what the file says of schedule, learning rate and weight decay, and
            the resolved ``model.dtype``.
        world_size: number of ranks.
        gpu_has_bfloat16: whether ``model.dtype auto`` may choose bfloat16.

    Raises:
        ValueError: what cannot work, with what to change.
    """
    config = copy.deepcopy(config)
    settings = _take_checkpointing(config, settings)
    take_keys(config)
    zero = config["zero_optimization"] = _section(config, "zero_optimization", '{"stage": 2}')
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in SUPPORTED_STAGES:
        raise ValueError(
            f"zero_optimization.stage {stage!r}: supported are {SUPPORTED_STAGES}; use --ds.zero_optimization.stage 2"
        )
    _check_zero(config, zero, stage)
    optimizer, settings = _take_optimizer(config, _take_scheduler(config, settings))
    if optimizer.name in BITSANDBYTES:
        config["zero_allow_untested_optimizer"] = True  # tested here
        if settings.checkpoint.format == "deepspeed":
            raise ValueError(
                f"checkpoint.format deepspeed keeps the moments of {optimizer.name} in a form that nothing reads back: use rosa"
            )
    dtype = _resolve_dtype(config, settings.model.dtype, gpu_has_bfloat16)
    if dtype == "float16" and stage == 0:  # DeepSpeed 0.19.8: gradients 65,536 times too small (its pull request 8393)
        raise ValueError(
            "float16 at stage 0: DeepSpeed divides its gradients by a loss scale that it has not multiplied the loss with; use "
            "--ds.zero_optimization.stage 1, or --model.dtype bfloat16"
        )
    _check_gradients(config, dtype, stage)
    compiler, settings = _take_compiler(config, settings, stage)
    total, micro, steps = resolve_batch(config, world_size)
    config |= _batch_section(micro, steps, world_size)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})
    _check_number(config, "gradient_clipping", "")
    if config.get("gradient_clipping") == "auto":
        config["gradient_clipping"] = 1.0
    config.setdefault("steps_per_print", 2**31 - 1)  # our own log says what a step did
    _drop_auto(config, "")
    return DeepSpeedPlan(config, optimizer, total, micro, steps, dtype, stage, compiler), settings


def _check_zero(config: dict[str, Any], zero: dict[str, Any], stage: int) -> None:
    """Offloading, and what else a ZeRO section may hold. Raises: ValueError for what cannot work."""
    for name in STAGE3_NAMES:
        if name in zero:
            if f"stage3_{name}" in zero:
                raise ValueError(f"zero_optimization has {name} and stage3_{name}, which are one option: remove one")
            zero[f"stage3_{name}"] = zero.pop(name)
    _check_refused(zero, _REFUSED_ZERO, "zero_optimization.")
    _check_number(zero, "allgather_bucket_size", "zero_optimization.")
    if zero.get("allgather_bucket_size", "auto") != "auto" and zero["allgather_bucket_size"] % 2:
        raise ValueError(
            f"zero_optimization.allgather_bucket_size {zero['allgather_bucket_size']}: DeepSpeed takes even numbers only; "
            "give one, or remove it"
        )
    if _section(zero, "leaf_module", '{"classes": ["MixtralSparseMoeBlock"]}', "zero_optimization.") and stage != 3:
        raise ValueError(f"zero_optimization.leaf_module at stage {stage}: only stage 3 gathers modules; remove it")
    for key in ("offload_optimizer", "offload_param"):
        section = _section(zero, key, '{"device": "cpu"}', "zero_optimization.")
        _check_refused(section, _REFUSED_OFFLOAD, f"zero_optimization.{key}.")
        device = section.get("device") or "none"
        if device == "none":
            continue
        if stage != 3 or device != "cpu":
            raise ValueError(
                f"zero_optimization.{key} to {device!r} at stage {stage}: only stage 3 offloads, and only to cpu; remove it "
                "(adapters have a small optimizer state) or use ds_configs/zero3_offload.json"
            )
        # DeepSpeed's own CPU optimizer must be compiled and knows no parameter groups of ours by name.
        config.setdefault("zero_force_ds_cpu_optimizer", False)


def _check_gradients(config: Mapping[str, Any], dtype: str, stage: int) -> None:
    """Raise ValueError for ways to sum gradients that DeepSpeed refuses after the model is loaded."""
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    wanted = _section(config, "data_types", '{"grad_accum_dtype": "fp32"}').get("grad_accum_dtype")
    allowed = dict.fromkeys([names[dtype], *(["fp32"] if stage else [])])
    if wanted not in (None, *allowed):
        raise ValueError(
            f"data_types.grad_accum_dtype of the DeepSpeed file is {' or '.join(allowed)} for {dtype} at stage {stage}, given {wanted!r}"
        )
    operation = config.get("gradient_allreduce_op", "mean")
    allowed = dict.fromkeys(["mean"] if stage == 3 else ["mean", "sum"])
    if str(operation).lower() not in allowed:
        raise ValueError(
            f"gradient_allreduce_op of the DeepSpeed file is {' or '.join(allowed)} at stage {stage}, given {operation!r}"
        )
    _check_number(config, "gradient_predivide_factor", "")
    scatters = config["zero_optimization"].get("reduce_scatter", True) is not False
    if stage and scatters and config.get("gradient_predivide_factor", "auto") not in (None, "auto", 1, 1.0):
        raise ValueError(
            f"gradient_predivide_factor {config['gradient_predivide_factor']} at stage {stage}: DeepSpeed needs "
            "zero_optimization.reduce_scatter false with it; remove it, or give that"
        )


def _take_compiler(config: dict[str, Any], settings: RunConfig, stage: int) -> tuple[str | None, RunConfig]:
    """The section ``compile`` becomes ``training.compile``; it alone may name another backend than inductor.

    Returns: the backend of torch.compile, ``None`` where nothing is compiled.
    Raises: ValueError beside what cannot be compiled.
    """
    section = _section(config, "compile", '{"enabled": true, "backend": "inductor"}')
    config.pop("compile", None)
    enabled, backend = section.get("enabled"), section.get("backend", "inductor")
    if enabled is not None:
        if not isinstance(enabled, bool):
            raise ValueError(f"compile.enabled of the DeepSpeed file is true or false, given {enabled!r}")
        settings = _merge_training(settings, {"compile": enabled}, "compile.enabled")
    if backend not in _COMPILERS:
        raise ValueError(f"compile.backend of the DeepSpeed file is {' or '.join(_COMPILERS)}, given {backend!r}")
    if not settings.training.compile:
        return None, settings
    beside = {
        f"zero_optimization.stage {stage}": (
            stage == 3,
            "DeepSpeed gathers weights by hooks, which a graph does not call",
        ),
        f"model.quantization {settings.model.quantization}": (
            settings.model.quantization != "none",
            "only dense weights are compiled",
        ),
        "adapter.partition_positions true": (settings.adapter.partition_positions, "a graph cannot gather positions"),
        "training.gradient_checkpointing host": (
            settings.training.gradient_checkpointing == "host",
            "torch makes no graph of a block whose input goes to the host",
        ),
    }
    for what, (given, why) in beside.items():
        if given:
            raise ValueError(f"training.compile with {what}: {why}; remove one of the two")
    return str(backend), settings


def _check_refused(section: Mapping[str, Any], options: Mapping[str, tuple[Any, str]], path: str) -> None:
    for key, (harmless, why) in options.items():
        if section.get(key) not in (None, "auto", harmless):
            raise ValueError(f"{path}{key} {section[key]!r} is not supported{why}: remove it")


def _take_scheduler(config: dict[str, Any], settings: RunConfig) -> RunConfig:
    """DeepSpeed's warm-up schedulers become ours (a pure function of the step)."""
    section = _section(config, "scheduler", '{"type": "WarmupLR"}')
    if config.pop("scheduler", None) is None:
        return settings
    name = section.get("type")
    if name not in _SCHEDULERS:
        raise ValueError(
            f"scheduler {name!r} of the DeepSpeed file is not one of {', '.join(_SCHEDULERS)}: remove the section and "
            "use training.scheduler and training.warmup_steps"
        )
    given: dict[str, Any] = {"scheduler": _SCHEDULERS[name]}
    params = _section(section, "params", '{"warmup_num_steps": 100}', "scheduler.")
    _check_number(params, "warmup_num_steps", "scheduler.params.", whole=True)
    if params.get("warmup_num_steps", "auto") != "auto":
        given["warmup_steps"] = int(params["warmup_num_steps"])
    return _merge_training(settings, given, "scheduler")


def _take_checkpointing(config: dict[str, Any], settings: RunConfig) -> RunConfig:
    """A section ``activation_checkpointing`` that asks for something recomputes activations.

    DeepSpeed reads it for models that call ``deepspeed.checkpointing``, which those of transformers do not.
    """
    section = _section(config, "activation_checkpointing", '{"cpu_checkpointing": true}')
    known = {key: section[key] for key in SECTIONS["activation_checkpointing"].known & section.keys()}
    for key, value in known.items():
        if key != "number_checkpoints" and value is not None and not isinstance(value, bool):
            raise ValueError(f"activation_checkpointing.{key} of the DeepSpeed file is true or false, given {value!r}")
    if section.get("number_checkpoints") is not None:
        _check_number(section, "number_checkpoints", "activation_checkpointing.", whole=True)
    if not any(known.values()):
        return settings
    host = bool(section.get("cpu_checkpointing"))
    if host or not settings.training.gradient_checkpointing:
        given = {"gradient_checkpointing": "host" if host else True}
        settings = _merge_training(settings, given, "activation_checkpointing")
    logger.info(
        "activation_checkpointing of the DeepSpeed file: training.gradient_checkpointing %s",
        json.dumps(settings.training.gradient_checkpointing),
    )
    return settings


def _take_optimizer(config: dict[str, Any], settings: RunConfig) -> tuple[OptimizerChoice, RunConfig]:
    """The optimizer section, taken out: it is built here with one parameter group per learning rate of ours.

    The section's ``lr`` is ``training.learning_rate`` and its ``weight_decay`` ``training.weight_decay``.
    """
    section = _section(config, "optimizer", '{"type": "AdamW"}') or {"type": "AdamW"}
    config.pop("optimizer", None)
    given = section.get("type")
    names = {name.lower(): name for name in _OPTIMIZERS}
    if str(given).lower() not in names:
        raise ValueError(
            f"optimizer type {given!r} of the DeepSpeed file is not supported: {', '.join(_OPTIMIZERS[:-1])} and {_OPTIMIZERS[-1]} are."
            f"{did_you_mean(str(given), _OPTIMIZERS)}"
        )
    name = names[section["type"].lower()]
    params = _section(section, "params", '{"betas": [0.9, 0.999]}', "optimizer.")
    _check_optimizer(params)
    arguments = {key: value for key, value in params.items() if value != "auto"}
    ours = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    given = {name: float(arguments.pop(key)) for key, name in ours.items() if key in arguments}
    settings = _merge_training(settings, given, "optimizer.params")
    # DeepSpeed reads Adam as AdamW unless adam_w_mode is false
    decoupled = arguments.pop("adam_w_mode", True) or "AdamW" in name
    known = ("betas", "eps", "amsgrad") if name in ("Adam", "AdamW") else ("betas", "eps")
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(
            f"optimizer.params.{unknown[0]} of the DeepSpeed file is not known: {name} has {', '.join(known)}"
        )
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    arguments["weight_decay"] = settings.training.weight_decay
    if name == "DeepSpeedCPUAdam":
        arguments["adamw_mode"] = decoupled
    elif name in BITSANDBYTES:
        if not decoupled and settings.training.weight_decay:
            raise ValueError(f"optimizer {name} decays weights as AdamW does: leave adam_w_mode out, or use Adam")
    else:
        name = "AdamW" if decoupled else "Adam"
    return OptimizerChoice(name, arguments), settings


def _check_optimizer(params: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of Adam that are no numbers, or outside of what it computes with."""
    path = "optimizer.params."
    for key in ("lr", "weight_decay", "eps"):
        _check_number(params, key, path)
    betas = params.get("betas", "auto")
    if betas == "auto":
        return
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(
            f"{path}betas of the DeepSpeed file is a list of two numbers such as [0.9, 0.999], given {betas!r}"
        )
    for number, beta in enumerate(betas):
        _check_number({f"betas[{number}]": beta}, f"betas[{number}]", path, below=1.0)


def _merge_training(settings: RunConfig, given: dict[str, Any], source: str) -> RunConfig:
    """Settings with what the DeepSpeed file says of ``training``; a setting of ours that says otherwise is an error."""
    training = settings.training
    for name, value in given.items():
        if name in training.model_fields_set and getattr(training, name) != value:
            raise ValueError(
                f"{source} of the DeepSpeed file says {value!r}, training.{name} {getattr(training, name)!r}: remove one of the two"
            )
    return settings.model_copy(update={"training": training.model_copy(update=given)})


def _resolve_dtype(config: dict[str, Any], wanted: str, gpu_has_bfloat16: bool) -> str:
    """Compute type from ``model.dtype`` and the file's ``bf16``/``fp16``; writes both sections."""
    sections = {
        name: (key, _section(config, key, '{"enabled": true}'))
        for key, name in (("bf16", "bfloat16"), ("fp16", "float16"))
    }
    enabled = {name: section.get("enabled", "auto") for name, (_, section) in sections.items()}
    for name, value in enabled.items():
        if value != "auto" and not isinstance(value, bool):
            raise ValueError(
                f'{sections[name][0]}.enabled of the DeepSpeed file is true, false or "auto", given {value!r}'
            )
    on = [name for name, value in enabled.items() if value is True]
    if len(on) == 2:
        raise ValueError("bf16.enabled and fp16.enabled are both true in the DeepSpeed file: choose one")
    if on and wanted not in ("auto", on[0]):
        raise ValueError(f"model.dtype {wanted} but the DeepSpeed file enables {on[0]}: change one of the two")
    if wanted == "auto":
        refused = enabled["bfloat16"] is False
        wanted = on[0] if on else ("bfloat16" if gpu_has_bfloat16 and not refused else "float32")
    elif enabled.get(wanted) is False and not on:
        raise ValueError(
            f"model.dtype {wanted} but the DeepSpeed file sets it to enabled: false: change one of the two"
        )
    for name, (key, section) in sections.items():
        config.pop(key, None)
        if name == wanted:
            config[key] = {**section, "enabled": True}
    return wanted


def resolve_batch(config: dict[str, Any], world_size: int) -> tuple[int, int, int]:
    """Examples of a step, micro-batch and accumulation steps, with ``examples <= micro · accumulation · world``.

    Whatever is missing or ``"auto"`` follows from the rest; with nothing given a step has 16 examples, and a micro-batch
    at most 8. A number of examples that micro-batches of the ranks cannot share equally leaves less than one micro-batch
    of each rank empty, so that a run can go on with any number of ranks; what is given of the two is then the most.

    Raises:
        ValueError: three numbers that do not agree.
    """
    given = {key: config.get(key, "auto") for key in BATCH_KEYS}
    for key, value in given.items():
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f'{key} is a whole number of 1 or more, or "auto"; given {value!r}')
    total, micro, steps = (None if value == "auto" else value for value in given.values())
    if total is None:
        if micro is not None or steps is not None:
            total = (micro or 1) * (steps or 1) * world_size
        else:
            total = max(DEFAULT_TRAIN_BATCH_SIZE, world_size)
    elif micro is not None and steps is not None and micro * steps * world_size != total:
        raise ValueError(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu × gradient_accumulation_steps × ranks "
            f'({micro} × {steps} × {world_size}): change one of them or set it to "auto"'
        )
    share = -(-total // world_size)
    if steps is None:
        steps = -(-share // (micro or MAX_AUTO_MICRO_BATCH_SIZE))
    micro = -(-share // steps)
    return total, micro, -(-share // micro)


def _batch_section(micro: int, steps: int, world_size: int) -> dict[str, int]:
    return dict(zip(BATCH_KEYS, (micro * steps * world_size, micro, steps), strict=True))


def _drop_auto(section: dict[str, Any], path: str) -> None:
    """Remove ``"auto"`` where DeepSpeed has a default of its own; elsewhere it is an error."""
    for key, value in list(section.items()):
        if isinstance(value, dict):
            _drop_auto(value, f"{path}{key}.")
        elif value == "auto":
            if not path.startswith(("zero_optimization.", "fp16.", "bf16.")):
                raise ValueError(
                    f'"{path}{key}": "auto" in the DeepSpeed file cannot be resolved: give a value or remove it'
                )
            del section[key]


def _section(config: Mapping[str, Any], key: str, example: str, path: str = "") -> dict[str, Any]:
    """A section of the file; nothing where it has none. Raises: ValueError for anything but an object."""
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}{key} of the DeepSpeed file is a section such as {example}, given {section!r}")
    return section


def _check_number(
    section: Mapping[str, Any], key: str, path: str, least: float = 0.0, below: float = math.inf, whole: bool = False
) -> None:
    """Raise ValueError unless a key is missing, "auto", or a number in [least, below)."""
    value = section.get(key, "auto")
    if value == "auto":
        return
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < below:
        kind = "a whole number" if whole else "a number"
        end = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{path}{key} of the DeepSpeed file is {kind}, {least:g} or more{end}, given {value!r}")


def keep_batch(plan: DeepSpeedPlan, given: dict[str, Any], batch_size: int) -> DeepSpeedPlan:
    """The plan of a resumed run: where only the number of ranks decided how many examples a step has, as many as before.

    Args:
        given: the user's DeepSpeed JSON.
        batch_size: examples of a step, of the checkpoint.
    """
    asked = any(given.get(key, "auto") != "auto" for key in ("train_batch_size", "gradient_accumulation_steps"))
    if asked or batch_size == plan.batch_size:
        return plan
    total, micro, steps = resolve_batch({**given, "train_batch_size": batch_size}, plan.ranks)
    config = {**plan.config, **_batch_section(micro, steps, plan.ranks)}
    kept = dataclasses.replace(plan, config=config, batch_size=total, micro_batch_size=micro, accumulation_steps=steps)
    logger.info("train_batch_size as in the checkpoint; %s", kept.step())
    return kept


def check_packages(plan: DeepSpeedPlan, tensorboard: bool) -> None:
    """Raise ValueError for a package that a run needs and that is not installed, before anything is loaded."""
    eight_bit = plan.optimizer.name in BITSANDBYTES
    needed = (
        (tensorboard, "training.tensorboard", "tensorboard", "tensorboard"),
        (eight_bit, f"optimizer {plan.optimizer.name}", "bitsandbytes", "quantization"),
    )
    for wanted, what, package, extra in needed:
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{what} needs the package {package}: pip install 'rosa-ds[{extra}]'")
