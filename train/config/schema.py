"""The sections of a run's configuration. Field docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

MethodName = Literal["melora", "lora", "rslora", "lora+", "dora", "adalora", "gralora", "bitfit", "head", "full"]

_PLAIN_NAME = re.compile(r"[\w./-]+")


def _names_from_words(words: list[str]) -> tuple[str, ...] | str | None:
    """One word that can't be a plain name is a regular expression; "all-linear" and "None" are words of their own."""
    if words == ["None"]:
        return None
    if len(words) == 1 and (words[0] == "all-linear" or not _PLAIN_NAME.fullmatch(words[0])):
        return words[0]
    return tuple(words)


def _words_from_names(names: tuple[str, ...] | str | None) -> list[str]:
    if names is None:
        return ["None"]
    return [names] if isinstance(names, str) else list(names)


def _pattern_from_words(words: list[str]) -> dict[str, Any]:
    pattern: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} is not PATH=VALUE or PATH=VALUE,VALUE")
        numbers = [float(v) if "." in v or "e" in v else int(v) for v in value.split(",")]
        pattern[name] = tuple(numbers) if len(numbers) > 1 else numbers[0]
    return pattern


def _words_from_pattern(pattern: dict[str, Any]) -> list[str]:
    return [
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in pattern.items()
    ]


_NAMES = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME ...]|REGEX|None",
    instance_from_str=_names_from_words,
    is_instance=lambda value: value is None or isinstance(value, str | tuple),
    str_from_instance=_words_from_names,
)

_PATTERN = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[PATH=VALUE ...]",
    instance_from_str=_pattern_from_words,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=_words_from_pattern,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The pretrained model."""

    name: str = ""
    """A folder with config.json and safetensors, or a Hugging Face hub id."""
    task: Literal["classification", "regression", "causal-lm"] = "classification"
    """What the model predicts: a class, one number, or the next token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation; adapters and optimizer state stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a decoder's backward pass computes again, to save memory: nothing, all but products, or whole layers."""
    stack_layers: bool = False
    """Run equal layers as one scan: a deep model compiles in the time of a shallow one."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the frozen kernels of the layers in 8 or 4 bits; adapters are trained in float32 on top."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The method and its adapters; other keys are `melora_jax.MELoRAConfig` arguments, None being the method's own."""

    method: MethodName = "melora"
    """What is trained: mini-adapters, one of LoRA's kinds, the biases, the head alone, or all of the model."""
    n: int | None = None
    """Mini-adapters a layer; it divides both sizes of each adapted layer. By default 8, for gralora 2; 1 is LoRA."""
    r: int | tuple[int, ...] | None = None
    """Rank of one mini-adapter, or one rank a mini. By default 1, for LoRA's kinds 8."""
    alpha: float | tuple[float, ...] | None = None
    """Numerator of the adapter's scale, or one a mini. By default 16."""
    dropout: float | None = None
    """Probability of zeroing an input feature of an adapter. By default 0."""
    scaling: Literal["mini", "total", "rslora"] | None = None
    """Scale: mini is alpha/r, total alpha/(n*r), rslora alpha/sqrt(n*r). By default mini."""
    mixer: Literal["identity", "all", "shuffle", "scatter"] | None = None
    """identity is MELoRA, all is LoRA of rank r, shuffle is GraLoRA, scatter deals features to minis at random. By
    default identity."""
    strategy: Literal["auto", "batched", "packed", "merged"] | None = None
    """How the product is computed; all give the same result. By default auto."""
    targets: Annotated[tuple[str, ...] | str | None, _NAMES] = None
    """Layers to adapt: name suffixes, one regular expression, or all-linear. By default query and value."""
    exclude: Annotated[tuple[str, ...] | str | None, _NAMES] = None
    """Layers to leave alone: name suffixes or one regular expression."""
    layers: tuple[int, ...] | None = None
    """Adapt only the layers with these numbers."""
    n_pattern: Annotated[dict[str, int], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of n, by path suffix or regular expression."""
    rank_pattern: Annotated[dict[str, int | tuple[int, ...]], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of r, by path suffix or regular expression."""
    alpha_pattern: Annotated[dict[str, float | tuple[float, ...]], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of alpha, by path suffix or regular expression."""
    modules_to_save: tuple[str, ...] = ("classifier",)
    """Suffixes of modules trained whole beside the adapters, such as the head."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases of the base that are trained too: lora_only are those of adapted layers. By default none."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] | None = None
    """Start: kaiming and gaussian of A alone, orthogonal with A*B = 0, pissa at the kernel's principal part. By default
    kaiming."""


@dataclasses.dataclass(frozen=True)
class AdaLoRAConfig:
    """How method=adalora allocates ranks; adapter.r is the rank at the start. None takes the default."""

    target_r: int | None = None
    """Mean rank of a mini-adapter at the end; by default half of adapter.r, rounded up."""
    tinit: int | None = None
    """Steps at the start in which all ranks stay; by default a tenth of all."""
    tfinal: int | None = None
    """Steps at the end in which the chosen ranks stay; by default three tenths of all."""
    delta_t: int | None = None
    """Steps from one choice to the next; by default 10, or the length of the phase that chooses if that is less."""
    beta1: float | None = None
    """Decay of the smoothed sensitivity; by default 0.85."""
    beta2: float | None = None
    """Decay of its uncertainty; by default 0.85."""
    orthogonality: float | None = None
    """Weight in the loss of the factors' distance from orthogonal ones; by default 0.5."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text: a hub data set (`name`), or two local files (`train` and `validation`)."""

    name: str | None = None
    """A Hugging Face data set, or a GLUE task as glue/rte; beside two files it names the task that they hold."""
    subset: str | None = None
    """The hub data set's subset (configuration), where it has several."""
    validation_split: str | None = None
    """The hub split that is held out; by default validation, or what GLUE uses."""
    train: str | None = None
    """Training rows: a .jsonl, .json, .csv, .tsv (without quoting) or .parquet file."""
    validation: str | None = None
    """Held-out rows, same formats."""
    text: tuple[str, ...] = ()
    """One or two text columns; by default GLUE's own, else text."""
    label: str = "label"
    """The label column."""
    label_names: tuple[str, ...] = ()
    """Class names in the order of their numbers; by default the data set's own, else sorted."""
    max_length: int = 256
    """Tokens a row; longer rows are cut, and counted."""
    buckets: tuple[int, ...] = (12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
    """Widths that batches are padded to, each compiled once; those under max_length count, and max_length itself."""
    train_limit: int | None = None
    """Train on this many rows, the first ones."""
    eval_limit: int | None = None
    """Evaluate on this many rows, the first ones."""
    held_back: int | None = None
    """Evaluate on this many training rows, drawn at random and left out of training, instead of the held-out ones:
    settings are to be chosen on rows that are not the reported ones."""


@dataclasses.dataclass(frozen=True)
class InstructionConfig:
    """How the rows of a causal-lm run, conversations, become tokens."""

    format: Literal["alpaca", "sharegpt", "messages", "completion"] | None = None
    """The rows' columns: instruction, input and output; conversations; messages; prompt and completion. By default the
    format that fits."""
    template: Literal["chat", "alpaca"] = "chat"
    """The tokenizer's own chat template, or Stanford Alpaca's."""
    loss: Literal["responses", "all"] = "responses"
    """The tokens that count in the loss."""
    lost: Literal["drop", "error"] = "drop"
    """What to do with a row whose whole response lies beyond data.max_length, if only responses count."""
    held_out: int | None = None
    """Hold out this many training rows, drawn at random, instead of reading data.validation."""
    pack: bool = True
    """Put several conversations into one row of data.max_length tokens, none seeing another; else one a row."""
    chunk: int = 1024
    """Tokens whose logits are held at once."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 4e-4
    """Peak learning rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of modules_to_save; by default learning_rate (the authors take half of it)."""
    b_learning_rate: float | None = None
    """Peak learning rate of the B factors; by default learning_rate, for adapter.method=lora+ 16 times it."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all trainable arrays."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    warmup_ratio: float = 0.06
    """Share of all steps in which the learning rate rises from 0."""
    clip_norm: float = 1.0
    """Largest global norm of the trainable gradients."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """The learning rate's course after warm-up."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = 3
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that is sooner."""
    batch_size: int = 32
    """Rows an optimizer step."""
    accumulate: int = 1
    """Parts a batch is split into, one after another, to save memory."""
    seed: int = 42
    """Seed of the head, the adapters, the order of rows and dropout."""
    data_seed: int | None = None
    """Seed of the order of rows alone; by default seed."""
    eval_every: int | None = None
    """Steps between evaluations; by default an epoch."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    eval_batch_size: int = 64
    """Rows an evaluation batch."""
    metric: str | None = None
    """The metric that ranks checkpoints (or loss); by default the task's first."""
    warm_start: str | None = None
    """The folder of an adapter, such as one trained on MNLI, whose factors are the start; heads are drawn at random."""
    patience: int | None = None
    """Stop after this many evaluations without a better metric; by default never."""
    log_every: int = 10
    """Steps between log entries."""
    tensorboard: bool = False
    """Write TensorBoard events too."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work. All 1 is one device; -1 in one of the three means all remaining devices."""

    data: int = 1
    """Parts that a batch's rows are divided among; each holds the whole base model."""
    fsdp: int = 1
    """The same, but the base model is divided too, and gathered a layer at a time."""
    tensor: int = 1
    """Parts that attention heads, inner features and mini-adapters are divided among."""
    whole_factors: Literal["say", "error"] = "say"
    """What to do if tensor does not divide n, so that every device would hold an adapter's factors whole."""

    @property
    def sizes(self) -> dict[str, int]:
        """Parts by axis."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several hosts that run the same command, one process each, and share a file system."""

    cluster: Literal["none", "auto"] = "none"
    """auto: SLURM, Open MPI or a TPU pod tells the processes of each other."""
    coordinator: str | None = None
    """host:port of process 0, if no cluster tells it."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """The number of this one, from 0; give it on the command line."""


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    folder: str = ""
    """The run's folder; by default runs/ and the recipe's name."""


@dataclasses.dataclass(frozen=True)
class Sections:
    """Fine-tune a pretrained model with MELoRA adapters."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    instruction: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    adalora: AdaLoRAConfig = dataclasses.field(default_factory=AdaLoRAConfig)
