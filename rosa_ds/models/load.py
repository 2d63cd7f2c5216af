"""Load a base model and its tokenizer, and say exactly which base it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.autograd.graph import save_on_cpu
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.data.chat import choose_template
from rosa_ds.models.checks import is_finite, not_finite
from rosa_ds.models.task import auto_class, classes_of, configure, describe_task, mark_new, new_numbers, new_parameters
from rosa_ds.models.weights import WEIGHT_SUFFIXES, check_weights, find_safetensors, hash_files, weight_files
from rosa_ds.utils.suggest import did_you_mean_path

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "tiny"
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    UnpicklingError,
)
"""What transformers raises of files that it cannot read or make sense of; RuntimeError of tensors and .bin files."""
_LONGEST = 600
"""Characters of a message of transformers that are shown; some list every class that there is."""


def load_model(settings: ModelSettings, dtype: torch.dtype, seed: int = 42) -> PreTrainedModel:
    """The base model, dense, in ``dtype``, on the CPU, in evaluation mode. Code from the hub is never run.

    Args:
        seed: of the head of a classifier, where the base has none for its classes.

    Raises:
        ValueError: it cannot be loaded, with transformers' reason.
    """
    name, arguments = resolve(settings.name_or_path)
    more: dict[str, Any] = {**arguments, "ignore_mismatched_sizes": True}  # they are refused below, by name
    check_files(settings)
    if settings.task == "causal-lm":
        check_language_model(settings)
    if settings.attn_implementation is not None:
        more["attn_implementation"] = settings.attn_implementation
    if settings.task == "classification":
        more["config"] = read_config(settings)
    try:
        model, report = auto_class(settings.task).from_pretrained(
            name,
            dtype=dtype,
            revision=settings.revision or "main",
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    except SafetensorError as error:
        raise damaged(settings.name_or_path, _damaged_files(Path(name)) or "its safetensors", error) from error
    except _BROKEN as error:
        raise _refused(settings, error) from error
    if "gguf_file" not in arguments and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} is stored quantised: give the dense model, and model.quantization nf4 or int8"
        )
    if settings.task == "classification":
        _begin_head(model, report, settings, seed)
    else:
        _check_complete(report, settings)
    with torch.no_grad():  # nothing could be trained with such a base, and nothing compared
        for key, parameter in model.named_parameters():
            if parameter.is_floating_point() and not is_finite(parameter):
                raise not_finite(key, settings.name_or_path)
    if "gguf_file" in arguments:
        # The weights are dense now; forget the quantised file so that the model can be trained and saved.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    return model.eval()


def check_files(settings: ModelSettings) -> None:
    """Raise ValueError for a base whose folder lacks weights, or has a PEFT adapter, which transformers would put into it in silence."""
    name, arguments = resolve(settings.name_or_path)
    own = getattr(_stored_config(settings), "transformers_weights", None)  # names its files itself
    if Path(name).is_dir() and "gguf_file" not in arguments and own is None:
        try:
            check_weights(Path(name))
        except ValueError as error:
            raise ValueError(f"model.name_or_path {settings.name_or_path!r} cannot be loaded: {error}") from error
    if found := find_adapter_config_file(name, revision=settings.revision or "main"):
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} holds a model and a PEFT adapter ({found}), which transformers puts into "
            "it: move adapter_config.json away to train the model alone, or merge the two first"
        )


def check_language_model(settings: ModelSettings) -> None:
    """Raise ValueError for a base that is a classifier, whose output head is none of a language model, or has an encoder."""
    config = _stored_config(settings)
    if classes := classes_of(config):
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} is a classifier ({', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''}): "
            "give --model.task classification, or a language model"
        )
    decoder = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    if config.is_encoder_decoder and not decoder:
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} has an encoder and a decoder ({config.model_type}): models that continue "
            "a text are trained here, and classifiers"
        )


def base_classes(settings: ModelSettings) -> list[str]:
    """The classes of a base that is a classifier already, in its order; none of another."""
    return classes_of(_stored_config(settings))


def keeps_head(settings: ModelSettings) -> bool:
    """Whether what the base has of a classifier's head goes on: not where it tells other classes apart."""
    classes = base_classes(settings) if settings.task == "classification" else []
    return not classes or settings.labels in ([], classes)


def read_config(settings: ModelSettings) -> Any:
    """A base's config, for which its folder or hub entry need hold nothing else. Raises: ValueError if it cannot be read."""
    return configure(_stored_config(settings), settings)


def _stored_config(settings: ModelSettings) -> Any:
    name, arguments = resolve(settings.name_or_path)
    try:
        return AutoConfig.from_pretrained(
            name, revision=settings.revision or "main", trust_remote_code=False, **arguments
        )
    except _BROKEN as error:
        raise _refused(settings, error) from error


def _refused(settings: ModelSettings, error: Exception, what: str = "model.name_or_path") -> ValueError:
    """One message for what transformers says, which may be pages."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnpicklingError):
        said = "its .bin files are damaged, or hold more than tensors: copy or download them again, or take safetensors"
    if isinstance(error, (TypeError, KeyError, AttributeError, ArithmeticError)):
        said = f"its files make no sense to transformers ({type(error).__name__}: {said}): are they whole?"
    if "trust_remote_code" in said:
        said = "it needs code of its own, which is never run here: use a model of an architecture that transformers has"
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
    name = settings.name_or_path
    hint = "" if Path(name).expanduser().exists() else did_you_mean_path(Path(name))
    if settings.attn_implementation is not None and "attn_implementation" in said:
        hint = f" Given is model.attn_implementation {settings.attn_implementation}."
    return ValueError(f"{what} {name!r} cannot be loaded: {said}{hint}")


def damaged(name: str, files: str, error: SafetensorError) -> ValueError:
    """For safetensors files that are not whole, or something else, such as a pointer of git-lfs."""
    return ValueError(f"model.name_or_path {name!r} cannot be loaded: {files}: {error}; copy or download it again")


def _damaged_files(folder: Path) -> str:
    """Names of the safetensors files of a folder that are not whole."""
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(path.name)
    return ", ".join(damaged)


@torch.no_grad()
def _begin_head(model: PreTrainedModel, report: Mapping[str, Any], settings: ModelSettings, seed: int) -> None:
    """Give the new parameters of a loaded classifier their numbers. Raises: ValueError if the base lacks others."""
    parameters = dict(model.named_parameters())
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    new, strange = new_parameters(model, [name for name in lacking if name in parameters], keeps_head(settings))
    if strange:
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} has no tensor of the right shape for {strange[0]} "
            f"({len(strange)} parameters): is it a base of this architecture?"
        )
    for name, numbers in new_numbers(model, new, seed).items():
        parameters[name].copy_(numbers)
    mark_new(model, new)


def _check_complete(report: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raise ValueError for parameters that the base's files lack or have in another shape, which would begin as noise."""
    if wrong := sorted(report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} cannot be loaded: size mismatch: {name} is {tuple(found)} in its files and "
            f"{tuple(wanted)} by its config.json ({len(wrong)} such): are both of one model?"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} cannot be loaded: its files have no tensor for {missing[0]} "
            f"({len(missing)} parameters): is it whole, and a base of this architecture?"
        )


def load_tokenizer(settings: ModelSettings, data: DataSettings | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token (the end-of-text token where it has none of its own, else another special one).

    Args:
        data: with the chat template and its arguments, where they are not the tokenizer's own.

    Raises:
        ValueError: it cannot be loaded, has no token to pad with, or the template is none for it.
    """
    name, arguments = resolve(settings.name_or_path)
    arguments.pop("attn_implementation", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=settings.revision or "main", trust_remote_code=False, **arguments
        )
    except Exception as error:  # tokenizers raises Exception itself
        if Path(name).is_dir() and not any(Path(name).glob("*token*")) and "gguf_file" not in arguments:
            raise ValueError(
                f"the tokenizer of {settings.name_or_path!r} cannot be loaded: its folder has no tokenizer.json; copy the tokenizer's "
                "files of the model there"
            ) from error
        raise _refused(settings, error, "the tokenizer of") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None and settings.task == "causal-lm":  # padding is masked: any token will do
        tokenizer.pad_token = next(
            (token for token in (tokenizer.unk_token, *tokenizer.all_special_tokens) if token), None
        )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {settings.name_or_path!r} has neither a padding token nor another special one: set pad_token in its "
                "tokenizer_config.json"
            )
    choose_template(tokenizer, data if data is not None else DataSettings())
    return tokenizer


def resolve(name_or_path: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a name: its first argument and further ones.

    Raises:
        ValueError: a path that does not exist.
    """
    if name_or_path == TINY:
        return str(TINY_FOLDER), {}
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model.name_or_path {name_or_path}: no such file.{did_you_mean_path(path)}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ValueError(f"model.name_or_path {name_or_path} is a file: give the model's folder, or a .gguf file")
    if path.is_dir():
        _check_folder(name_or_path, path)
    if not path.is_dir() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise ValueError(f"model.name_or_path {name_or_path}: no such folder.{did_you_mean_path(path)}")
    return (str(path), {}) if path.is_dir() else (name_or_path, {})


def _check_folder(name: str, folder: Path) -> None:
    """Raise ValueError for a folder that is something else than a model."""
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.name != "mask.safetensors"]
    if not weights and ((folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()):
        raise ValueError(
            f"model.name_or_path {name} is a run: export it first (rosa-ds export {name} OUT) and give OUT, or go on with --resume"
        )
    if (folder / "config.json").is_file():
        return
    if any((folder / name).is_file() for name in ("adapter_config.json", "rosa_adapter.json")):
        raise ValueError(
            f"model.name_or_path {name} is an adapter: give its base here, and this folder as adapter.init_from; or merge the two"
        )
    raise ValueError(
        f"model.name_or_path {name!r} cannot be loaded: it has no config.json; a model's folder holds that, weights "
        f"({', '.join(WEIGHT_SUFFIXES)}) and a tokenizer"
    )


def download(settings: ModelSettings) -> None:
    """Bring a hub model's safetensors files into the cache; nothing to do for a folder. Raises: OSError if that fails."""
    name, _ = resolve(settings.name_or_path)
    if Path(name).is_dir():
        return
    find_safetensors(name, settings.revision or "main")


def stored_dtype(settings: ModelSettings) -> torch.dtype:
    """The type in which the base stores its weights (float32 for a .gguf file)."""
    name, arguments = resolve(settings.name_or_path)
    if "gguf_file" in arguments:
        return torch.float32
    config = AutoConfig.from_pretrained(name, revision=settings.revision or "main", trust_remote_code=False)
    return config.dtype or torch.float32


def identify(settings: ModelSettings) -> dict[str, Any]:
    """Name, revision, a hash of the weight files, how they are quantised, and the classes: what an adapter or a checkpoint belongs to.

    Of a hub model the files that were downloaded count, so it is loaded first.
    """
    name, arguments = resolve(settings.name_or_path)
    if "gguf_file" in arguments:
        files: Sequence[Path] = [Path(name) / arguments["gguf_file"]]
    else:
        config = cached_file(name, "config.json", revision=settings.revision or "main")
        assert config is not None
        files = weight_files(Path(config).parent)
    if not files:
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r}: no weights ({', '.join(WEIGHT_SUFFIXES)}) are there"
        )
    base = {
        "name_or_path": settings.name_or_path,
        "revision": settings.revision,
        "hash": hash_files(files),
        **describe_task(settings),
    }
    if settings.quantization == "none":
        return base
    base |= {"quantization": settings.quantization, "double_quantization": settings.double_quantization}
    return base | ({"quantization_skip": settings.quantization_skip} if settings.quantization_skip else {})


def identified(base: Mapping[str, Any]) -> ModelSettings:
    """Settings that load what :func:`identify` described."""
    keys = ("name_or_path", "revision", "quantization", "double_quantization", "quantization_skip", "task", "labels")
    return ModelSettings(**{key: base[key] for key in keys if key in base})


def enable_checkpointing(model: PreTrainedModel, kind: bool | str) -> None:
    """Recompute activations as ``training.gradient_checkpointing`` says."""
    if not kind:
        return
    reentrant = kind in ("reentrant", "host")
    # transformers renamed it during version 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # a block whose input needs no gradient would not be recomputed
    if kind == "host":
        for module in model.modules():
            if (function := getattr(module, "_gradient_checkpointing_func", None)) is not None:
                module._gradient_checkpointing_func = functools.partial(_keep_on_host, function)


def _keep_on_host(checkpoint: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a block, and keep its inputs in the host's memory; the older way is the one that saves them as autograd does."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(*inputs)
