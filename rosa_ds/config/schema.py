"""Every setting of a run, as one typed tree: :class:`RunConfig`.

The tree is what a user may write in the section ``"rosa"`` of a DeepSpeed JSON file or give as
``--dotted.name value`` (:mod:`rosa_ds.config.command_line` reads both). The text under a field is its ``--help``.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rosa_ds.config.mask_scores import RANKINGS, Score
from rosa_ds.config.methods import METHODS, SUMMARIES, Method, Parts
from rosa_ds.config.template import Template

Task = Literal["causal-lm", "classification"]
Directions = Literal["random", "window", "top", "bottom", "projection"]
Factorization = Literal["gram", "svd"]
LossBlock = Literal["auto", "whole"] | Annotated[int, Field(ge=1)]
MergeBase = Literal["dequantized", "original"]
"""Of a quantised base: merge into the numbers that training saw, or into those that they were made of."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class ModelSettings(Section):
    """The base model."""

    name_or_path: str = "tiny"
    """Folder, hub name, .gguf file, or "tiny" (built in)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: as the DeepSpeed file says (bf16/fp16), else bfloat16 on GPUs that have it, else float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the frozen linear layers are kept, but for the output head: as they are, or with bitsandbytes in 4 bits (nf4) or 8 (int8); they compute in model.dtype."""
    double_quantization: bool = True
    """With nf4: the scales of its blocks in 8 bits, too (4.13 bits a number instead of 4.5)."""
    quantization_skip: list[str] = []
    """Modules that are not quantised, with all that is in them: names, name endings and regular expressions. A run adds the layers whose weight the model reads itself."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ... (its own choice where not given)."""
    task: Task = "causal-lm"
    """causal-lm: the next token; classification: the class of a text or a pair of texts, with a head that is trained whole."""
    labels: list[str] = []
    """Classes of task classification, in the order of the head's outputs. Where not given: those of data.train, or of a base that is a classifier of the same ones."""

    @field_validator("quantization", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: Any) -> Any:
        return "none" if value is None else value  # the command line reads none as null

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_names(cls, value: Any) -> Any:
        return [str(label) for label in value] if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _check_labels(self) -> ModelSettings:
        if self.labels and self.task != "classification":
            raise ValueError(f"model.labels are of model.task classification, given is {self.task}: remove them")
        if self.labels and (len(set(self.labels)) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"model.labels names two or more different classes, given {self.labels}")
        return self


class AdapterSettings(Section):
    """What is trained beside the frozen base."""

    rank: Annotated[int, Field(ge=0)] = 16
    """R of the low-rank part B·A."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The low-rank part is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the input of the low-rank part."""
    density: Annotated[float, Field(ge=0, le=1)] = 0.006
    """Share of each matrix's entries that the sparse part trains (0.006 = 0.6 %)."""
    sparse_product: Literal["scatter", "separate"] = "scatter"
    """How the base sees the sparse part: scatter writes the values into the weight for each product (a 16-bit weight rounds the sum), separate adds a sparse product of its own, which rounds no value against the weight (slower)."""
    partition_positions: bool = False
    """At stages 0 to 2, too, each rank keeps only its share of the masks, and gathers a layer's positions a layer ahead in forward and backward (at stage 3 they always are). Triton's plan of a mask, about 8 bytes an entry, stays whole on every GPU."""
    target_modules: list[str] = ["all-linear"]
    """Layers to adapt: all-linear (all but the output head), or names, name endings (q_proj) and regular expressions that a full name must match."""
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = {}
    """{regular expression found in the layer's name: rank}; the first that is found wins over rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """{regular expression found in the layer's name: alpha}; the first that is found wins over alpha."""
    density_pattern: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """{regular expression found in the layer's name: density}; the first that is found wins over density."""
    modules_to_save: list[str] = []
    """Modules to train whole (names or name endings), for example embed_tokens or a norm."""
    low_rank_lr: Annotated[float, Field(ge=0)] = 7e-4
    """Learning rate of A and B."""
    sparse_lr: Annotated[float, Field(ge=0)] = 2e-4
    """Learning rate of the sparse values."""

    @field_validator("target_modules", "modules_to_save", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class AdapterConfig(AdapterSettings):
    """:class:`AdapterSettings` with the method: what :func:`rosa_ds.inject` takes."""

    method: Annotated[Method, Field(description=f"Preset of parts: {SUMMARIES}.")] = "robust"

    @property
    def parts(self) -> Parts:
        """What the method trains."""
        return METHODS[self.method]

    @model_validator(mode="after")
    def _check_parts(self) -> AdapterConfig:
        if self.parts.low_rank and self.rank == 0 and not any(self.rank_pattern.values()):
            raise ValueError(f"adapter.rank is 0, but method {self.method} trains a low-rank part: set it to 1 or more")
        if self.parts.sparse and self.density == 0 and not any(self.density_pattern.values()):
            raise ValueError(f"adapter.density is 0, but method {self.method} trains a sparse part: set it above 0")
        if self.parts.everything and self.modules_to_save:
            raise ValueError(
                "adapter.modules_to_save has no meaning with method full, which trains everything: remove it"
            )
        return self


class StartedAdapterSettings(AdapterSettings):
    """:class:`AdapterSettings` of a run, which may begin with an adapter that is there already."""

    init_from: str | None = None
    """Begin with the numbers of an adapter: a run, a checkpoint or an adapter of ours, or a folder of PEFT (LORA, SUPERTUNING, SHIRA). Method, rank, alpha, density, targets and modules_to_save are the folder's where they are not given, and its positions are the mask."""


class MaskSettings(Section):
    """How the positions of the sparse part are chosen."""

    score: Annotated[
        Score,
        Field(
            description="Entries with the largest score are trained, over mask.steps steps: "
            + "; ".join(f"{name}: {ranking.means}" for name, ranking in RANKINGS.items())
        ),
    ] = "mean_squared"
    warmup_steps: Annotated[int, Field(ge=0)] = 64
    """Optimizer steps of the low-rank part alone before gradients are collected (scores that use a gradient)."""
    steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps over which gradients are collected."""
    after: Literal["restart", "continue"] = "restart"
    """restart: low-rank part, schedule and data order begin again with the mask known; continue: training goes on."""
    device_memory_gib: Annotated[float, Field(ge=0)] | None = None
    """What a rank's sums of gradients may take of its GPU while they are collected; the rest is kept in host memory. null: half of what is free."""
    load: str | None = None
    """A mask.safetensors of another run: no mask is computed."""


class DrawSettings(Section):
    """How the low-rank part of the subspace methods is drawn: before the first step, and again and again."""

    every: str = "1 epoch"
    """When it is folded into the base and drawn again: "100 steps", "2 epochs", or never (after the first draw)."""
    directions: Directions = "random"
    """Which singular directions of the base are trained: random (a uniform subset), window (neighbours), top, bottom; or projection: a random basis of the input, without any factorisation."""
    sigma: Literal["A", "B", "even"] = "A"
    """Which factor begins with the singular values: A (as in ROSA's code; B is orthonormal), B, or the root of them in both."""
    factorization: Factorization = "gram"
    """gram: eigenvectors of the smaller Gram matrix; svd: of the weight itself, slower, more exact for tiny singular values."""
    moments: Literal["reset", "keep", "project"] = "reset"
    """What Adam knows of A and B after a draw: nothing, the same numbers, or their part along the new directions."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate of A and B grows again after each draw but the first."""
    residual: bool = True
    """With a bfloat16 model and a base that is not quantised: keep the bits that rounding the base takes away (2 bytes a number, divided over the ranks), so that many draws do not add up their roundings."""

    @field_validator("every", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        found = re.fullmatch(r"\s*(\d+)\s*(step|epoch)s?\s*", str(value))
        if str(value).strip() == "never":
            return "never"
        if found is None or int(found[1]) == 0:
            raise ValueError(f'draw.every is "100 steps", "1 epoch" or never, given {value!r}')
        return f"{int(found[1])} {found[2]}{'s' if int(found[1]) > 1 else ''}"

    def steps(self, steps_per_epoch: int) -> int:
        """Steps from one draw to the next; 0: only the first one."""
        if self.every == "never":
            return 0
        count, unit = self.every.split()
        return int(count) * (1 if unit.startswith("step") else steps_per_epoch)


class MixedSource(Section):
    """One source of several that are trained together."""

    source: str
    weight: Annotated[float, Field(gt=0)] | None = None
    examples: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_share(self) -> MixedSource:
        if self.weight is not None and self.examples is not None:
            raise ValueError(f"{self.source}: weight and examples both say how much of it is trained: give one")
        return self


class DataSettings(Section):
    """Where the examples come from and how they become tokens."""

    train: str | list[MixedSource] = "builtin:sql"
    """File (.jsonl .json .csv .parquet), folder or hub name, each with an optional slice such as data.jsonl[:700]; or builtin:sql (generated). Several: a list of these, each alone or as {"source": ..., "examples": N} for N examples of it an epoch, or {"source": ..., "weight": W} for its share of an epoch."""
    eval: str | list[str] | None = None
    """As data.train; several are a list, and the loss of each is told. Where not given: a held-out set for builtin:sql, else no evaluation."""
    prompt_column: str | None = None
    """Column with the prompt, where the column names do not tell."""
    prompt_template: str | None = None
    """The prompt's text, made of several columns, in place of prompt_column: "{context}\\nQuestion: {question}". A backslash and n are a line break, and t a tab; one column may be empty where another is not."""
    completion_column: str | None = None
    """Column with the completion, where the column names do not tell."""
    text_column: str | None = None
    """Column with the text to classify, where the column names do not tell."""
    pair_column: str | None = None
    """Column with the second text of a pair to classify; data.text_column names the first."""
    label_column: str | None = None
    """Column with the class; where not given: label."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest example in tokens."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with an example of more tokens."""
    separator: str = "\n"
    """Put between prompt and completion where the tokenizer has no chat template, and between the texts of a pair where it has no separator token. A backslash and n are a line break, and t a tab."""
    chat_template: str | None = None
    """Jinja template of chats in place of the tokenizer's: a file, or the text itself. The run's tokenizer keeps it, so evaluation and export use it."""
    template_arguments: dict[str, Any] = {}
    """Variables of the chat template, such as {"enable_thinking": false}. They are written into the template of the run's tokenizer as defaults, so evaluation, export and whoever serves the model ask with the same."""
    template_clock: str | None = None
    """Date, or date and time, in ISO 8601 that a chat template which reads the clock (strftime_now) writes in training. Where not given: when the run begins, also for what a resumed run goes on with. Evaluation, export and whoever serves the model write the date of the day."""
    train_on: Literal["all", "last"] = "all"
    """Which of a chat's assistant turns are trained, but for those whose message says weight, train or loss_mask 0 or false."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenise, on the first rank of each node. null: the node's cores divided by its ranks."""
    batching: Literal["auto", "tokens", "sorted", "random"] = "auto"
    """How the examples of one optimizer step become micro-batches. tokens: without padding, as many tokens for each rank, the sequences one behind the other in a row; a model that does not keep them apart, as a test at the start finds, and a classifier get sorted ones. sorted: padded rows of similar length. random: padded rows in drawn order. auto: tokens where that takes fewer operations than sorted (attention without flash-attention computes every pair of a row's tokens)."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _list_of_sources(cls, given: Any, info: ValidationInfo) -> Any:
        """On a command line a list is JSON; a source to train may be its name alone."""
        if isinstance(given, str) and given.lstrip().startswith("["):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise ValueError(f"a list of sources is JSON, given {given}: {error}") from None
        if not isinstance(given, list) or info.field_name != "train":
            return given
        return [{"source": source} if isinstance(source, str) else source for source in given]

    @field_validator("train", "eval")
    @classmethod
    def _distinct_sources(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        names = [source if isinstance(source, str) else source.source for source in given]
        if not names:
            raise ValueError("an empty list of sources")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is named twice: give it once, with examples or a weight")
        weights = [isinstance(source, MixedSource) and source.weight is not None for source in given]
        if any(weights) and not all(weights):
            raise ValueError(f"weights divide an epoch among all sources: {names[weights.index(False)]} has none")
        return given

    @field_validator("separator", "prompt_template")
    @classmethod
    def _line_breaks(cls, text: str | None) -> str | None:
        """A shell gives what is typed as \\n in two characters."""
        return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")

    @field_validator("template_arguments")
    @classmethod
    def _names_of_variables(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if not name.isidentifier():
                raise ValueError(f"data.template_arguments name variables of the chat template, given {name!r}")
        return arguments

    @property
    def mixture(self) -> list[MixedSource]:
        """The sources of data.train."""
        return [MixedSource(source=self.train)] if isinstance(self.train, str) else self.train

    @field_validator("template_clock")
    @classmethod
    def _moment(cls, text: str | None) -> str | None:
        try:
            return None if text is None else datetime.fromisoformat(text).isoformat()
        except ValueError:
            raise ValueError(
                f"data.template_clock is a date or a date and time, as 2026-11-30 or 2026-11-30T09:00:00, given {text!r}"
            ) from None

    @model_validator(mode="after")
    def _prompt_and_completion(self) -> DataSettings:
        if self.prompt_column is not None and self.prompt_template is not None:
            raise ValueError("data.prompt_column and data.prompt_template both say what the prompt is: give one")
        if (self.prompt_column is None and self.prompt_template is None) != (self.completion_column is None):
            given = "prompt_template" if self.prompt_template is not None else "prompt_column"
            raise ValueError(f"data.{given} and data.completion_column belong together: give both or neither")
        if self.prompt_template is not None:
            Template(self.prompt_template)
        return self


class TrainingSettings(Section):
    """The run."""

    output_dir: str = "runs/default"
    """The run's folder. A finished or interrupted run that is in it already is moved aside unless --resume is given."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over data.train (after the mask, with mask.after restart)."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps instead of epochs."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Learning rate of method full, of adapter.modules_to_save and of a classifier's head."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of everything that is trained."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate grows from 0."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after its warm-up: to 0 linearly, to 0 along a cosine, or constant."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of data order, initialisation, dropout and random masks."""
    deterministic: bool = False
    """On GPUs, the same bits from the same run again, which attention's backward does not give by itself: torch takes the forms of its operators that do, and refuses those that have none. On CPUs it is always so."""
    gradient_checkpointing: bool | Literal["reentrant", "host"] = False
    """Recompute activations in backward instead of keeping them: true, reentrant for torch's older way, or host for that with
    what each block begins from kept in the host's memory."""
    compile: bool = False
    """Run the model's blocks as graphs of torch.compile (inductor), at ZeRO stages 0 to 2 with a dense base. The first steps compile, also after the mask; steps that collect gradients run as without."""
    loss_block: LossBlock = "auto"
    """Trained tokens whose logits are there at once, in training and evaluation: a number, auto (as many as 256 MiB hold in float32), or whole: those of a micro-batch. Models whose logits are not made by one output head take whole."""
    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between two lines of metrics.jsonl."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: before the first and after the last step only."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples a rank evaluates at once."""
    save_steps: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0: none but the last."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are deleted."""
    max_bad_steps: Annotated[int, Field(ge=0)] = 3
    """Steps in a row whose loss is not finite that are left out before the run stops."""
    stall_minutes: Annotated[float, Field(ge=0)] = 30.0
    """A rank that gets no further for so long ends the run and says which rank it waits for; 0: never."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Of a collective, and of the ranks finding each other, while the first of a node may still download or tokenise. null: 120, or twice stall_minutes if that is more."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run's folder."""


class CheckpointSettings(Section):
    """What is saved on the way."""

    format: Literal["rosa", "deepspeed"] = "rosa"
    """deepspeed: DeepSpeed's own sharded files, too, in the run's folder deepspeed/."""


class RunConfig(Section):
    """One training run."""

    method: Annotated[Method, Field(description=f"{SUMMARIES}.")] = "robust"
    model: ModelSettings = ModelSettings()
    adapter: StartedAdapterSettings = StartedAdapterSettings()
    mask: MaskSettings = MaskSettings()
    draw: DrawSettings = DrawSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @field_validator("model", "adapter", "mask", "draw", "data", "training", "checkpoint", mode="before")
    @classmethod
    def _section_is_object(cls, value: Any) -> Any:
        if not isinstance(value, (dict, BaseModel)):
            raise ValueError(f"a section is an object of settings, given {value!r}")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        self.adapter_config()
        data, other_task = self.data, ["text_column", "pair_column", "label_column"]
        if self.model.task == "classification":
            other_task = ["prompt_column", "prompt_template", "completion_column"]
        for name in other_task:
            if getattr(data, name) is not None:
                raise ValueError(f"data.{name} has no meaning with model.task {self.model.task}: remove it")
        if data.pair_column is not None and data.text_column is None:
            raise ValueError("data.pair_column is the second text of a pair: give data.text_column, too")
        if self.parts.everything and self.model.quantization != "none":
            raise ValueError(
                f"method full trains the base itself, which model.quantization {self.model.quantization} freezes: set it to none, "
                "or use an adapter"
            )
        if self.adapter.init_from is not None and self.mask.load is not None:
            raise ValueError("adapter.init_from brings its mask: remove mask.load")
        if self.parts.resampled and self.checkpoint.format == "deepspeed":
            raise ValueError(
                f"checkpoint.format deepspeed leaves out the base, which method {self.method} changes: use rosa, whose "
                "checkpoints have all of it"
            )
        return self

    def adapter_config(self) -> AdapterConfig:
        """The adapter section together with the method."""
        return AdapterConfig(method=self.method, **self.adapter.model_dump(exclude={"init_from"}))

    @property
    def parts(self) -> Parts:
        """What the method trains."""
        return METHODS[self.method]

    @property
    def collects_gradients(self) -> bool:
        """Whether the run has the phases warm-up and collect."""
        known = self.mask.load is not None or self.adapter.init_from is not None
        return self.parts.sparse and not known and RANKINGS[self.mask.score].gradient is not None


def setting_types(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all settings, e.g. ``adapter.rank``, and their types."""
    types: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            types |= setting_types(field.annotation, f"{prefix}{name}.")
        else:
            types[prefix + name] = field.annotation
    return types


def setting_names() -> list[str]:
    """Of :func:`setting_types`."""
    return list(setting_types())
