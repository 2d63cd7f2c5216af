"""Every setting of a run, as one typed tree: :class:`RunConfig`.

The tree is what a user may write in the section ``"rosa"`` of a DeepSpeed JSON file or give as
``--dotted.name value`` (:mod:`rosa_ds.cli` reads both). The text under a field is its ``--help``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Method = Literal["full", "lora", "sparse", "robust"]
Score = Literal["mean_squared", "mean", "random", "magnitude", "gradient_over_magnitude"]

LOW_RANK_METHODS = frozenset({"lora", "robust"})
SPARSE_METHODS = frozenset({"sparse", "robust"})
GRADIENT_SCORES = frozenset({"mean_squared", "mean", "gradient_over_magnitude"})
WEIGHT_SCORES = frozenset({"magnitude", "gradient_over_magnitude"})


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class ModelSettings(Section):
    """The base model."""

    name_or_path: str = "tiny"
    """Folder, hub name, .gguf file, or "tiny" (built in)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: as the DeepSpeed file says (bf16/fp16), else bfloat16 on GPUs that have it, else float32."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ... (its own choice where not given)."""


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

    method: Method = "robust"
    """Preset of parts: full, lora (low-rank), sparse, robust (RoSA: low-rank + sparse)."""

    @model_validator(mode="after")
    def _check_parts(self) -> AdapterConfig:
        if self.method in LOW_RANK_METHODS and self.rank == 0 and not any(self.rank_pattern.values()):
            raise ValueError(f"adapter.rank is 0, but method {self.method} trains a low-rank part: set it to 1 or more")
        if self.method in SPARSE_METHODS and self.density == 0 and not any(self.density_pattern.values()):
            raise ValueError(f"adapter.density is 0, but method {self.method} trains a sparse part: set it above 0")
        if self.method == "full" and self.modules_to_save:
            raise ValueError(
                "adapter.modules_to_save has no meaning with method full, which trains everything: remove it"
            )
        return self


class MaskSettings(Section):
    """How the positions of the sparse part are chosen."""

    score: Score = "mean_squared"
    """Entries with the largest score are trained: mean_squared or mean (of the gradient over mask.steps steps), gradient_over_magnitude (|mean gradient| / |weight|), magnitude (|weight|), random."""
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


class DataSettings(Section):
    """Where the examples come from and how they become tokens."""

    train: str = "builtin:sql"
    """File (.jsonl .json .csv .parquet), folder or hub name, each with an optional slice such as data.jsonl[:700]; or builtin:sql (generated)."""
    eval: str | None = None
    """As data.train. Where not given: a held-out set for builtin:sql, else no evaluation."""
    prompt_column: str | None = None
    """Column with the prompt, where the column names do not tell."""
    completion_column: str | None = None
    """Column with the completion, where the column names do not tell."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest example in tokens."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with an example of more tokens."""
    separator: str = "\n"
    """Put between prompt and completion where the tokenizer has no chat template."""
    batching: Literal["sorted", "random"] = "sorted"
    """Inside one optimizer step, micro-batches of examples of similar length (less padding) or in drawn order."""


class TrainingSettings(Section):
    """The run."""

    output_dir: str = "runs/default"
    """The run's folder. A finished or interrupted run that is in it already is moved aside unless --resume is given."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over data.train (after the mask, with mask.after restart)."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps instead of epochs."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Learning rate of method full and of adapter.modules_to_save."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of everything that is trained."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate grows from 0."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after its warm-up: to 0 linearly, to 0 along a cosine, or constant."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of data order, initialisation, dropout and random masks."""
    gradient_checkpointing: bool | Literal["reentrant"] = False
    """Recompute activations in backward instead of keeping them: true, or reentrant for torch's older way."""
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
    tensorboard: bool = False
    """Also write TensorBoard events to the run's folder."""


class CheckpointSettings(Section):
    """What is saved on the way."""

    format: Literal["rosa", "deepspeed"] = "rosa"
    """deepspeed: DeepSpeed's own sharded files, too, in the run's folder deepspeed/."""


class RunConfig(Section):
    """One training run."""

    method: Method = "robust"
    """full, lora (low-rank), sparse, robust (RoSA: low-rank + sparse)."""
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    mask: MaskSettings = MaskSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @field_validator("model", "adapter", "mask", "data", "training", "checkpoint", mode="before")
    @classmethod
    def _section_is_object(cls, value: Any) -> Any:
        if not isinstance(value, (dict, BaseModel)):
            raise ValueError(f"a section is an object of settings, given {value!r}")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        self.adapter_config()
        if (self.data.prompt_column is None) != (self.data.completion_column is None):
            raise ValueError("data.prompt_column and data.completion_column belong together: give both or neither")
        return self

    def adapter_config(self) -> AdapterConfig:
        """The adapter section together with the method."""
        return AdapterConfig(method=self.method, **self.adapter.model_dump())

    @property
    def collects_gradients(self) -> bool:
        """Whether the run has the phases warm-up and collect."""
        return self.method in SPARSE_METHODS and self.mask.load is None and self.mask.score in GRADIENT_SCORES

    def settings_without_effect(self) -> list[str]:
        """Settings that were given but change nothing in this run, each with the reason."""
        unused: dict[str, str] = {}
        if self.method not in LOW_RANK_METHODS:
            for name in ("rank", "alpha", "dropout", "rank_pattern", "low_rank_lr"):
                unused[f"adapter.{name}"] = f"method {self.method} has no low-rank part"
        if self.method not in SPARSE_METHODS:
            for name in ("density", "density_pattern", "sparse_lr", "sparse_product", "partition_positions"):
                unused[f"adapter.{name}"] = f"method {self.method} has no sparse part"
            for name in MaskSettings.model_fields:
                unused[f"mask.{name}"] = f"method {self.method} has no sparse part"
        elif self.collects_gradients and self.method not in LOW_RANK_METHODS:
            unused["mask.warmup_steps"] = f"method {self.method} has no low-rank part to warm up"
        elif not self.collects_gradients:
            reason = "the mask is loaded" if self.mask.load else f"mask.score {self.mask.score} needs no gradient"
            for name in ("warmup_steps", "steps", "after", "device_memory_gib"):
                unused[f"mask.{name}"] = reason
        if self.method == "full":
            unused["adapter.target_modules"] = "method full trains everything"
        elif not self.adapter.modules_to_save:
            unused["training.learning_rate"] = "adapters have adapter.low_rank_lr and adapter.sparse_lr"
        if self.training.max_steps is not None:
            unused["training.epochs"] = "training.max_steps is given"
        given = {f"{s}.{k}" for s in ("adapter", "mask", "training") for k in getattr(self, s).model_fields_set}
        return [f"{name} ({reason})" for name, reason in unused.items() if name in given]


def setting_names(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings, e.g. ``adapter.rank``."""
    names = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += setting_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
