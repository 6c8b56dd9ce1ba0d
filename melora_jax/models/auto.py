"""The model for a checkpoint, or a Hugging Face configuration, and a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

from flax import nnx

from melora_jax.models.base import MODEL_DTYPES, TASKS, LoadReport, label_names_of, with_dtype, with_task
from melora_jax.models.decoders.config import DecoderConfig
from melora_jax.models.decoders.heads import CausalLM, DecoderForSequenceClassification
from melora_jax.models.decoders.layers import DecoderParts
from melora_jax.models.decoders.model import REMAT, DecoderModel
from melora_jax.models.encoders.bert import BertModel
from melora_jax.models.encoders.config import EncoderConfig, Parts
from melora_jax.models.encoders.distilbert import DistilBertModel
from melora_jax.models.encoders.heads import (
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    RobertaForSequenceClassification,
)
from melora_jax.models.families import Family
from melora_jax.models.hub.checkpoint import Checkpoint, ModelSource, open_checkpoint
from melora_jax.models.hub.placement import lay_out
from melora_jax.nn.sharding import Layout

Classifier: TypeAlias = (
    BertForSequenceClassification
    | RobertaForSequenceClassification
    | DistilBertForSequenceClassification
    | DecoderForSequenceClassification
)
Model: TypeAlias = Classifier | BertModel | DistilBertModel | CausalLM | DecoderModel

# by the family's prefix: the body, and the body with each head
_BODIES: dict[str, Any] = {
    "bert": BertModel,
    "roberta": BertModel,
    "distilbert": DistilBertModel,
    "model": DecoderModel,
}
_CLASSIFIERS: dict[str, Any] = {
    "bert": BertForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
    "model": DecoderForSequenceClassification,
}
_LANGUAGE_MODELS: dict[str, Any] = {"model": CausalLM}


class ModelOptions(TypedDict, total=False):
    """What a model is built for; all are optional.

    Attributes:
      task: "sequence-classification" (the default), "regression" (one output), "causal-lm" or "encoder" (last hidden
        states).
      num_labels: outputs of the classification head; None takes their number from the configuration.
      label_names: a name for each label; None takes them from the configuration.
      dtype: "float32" (the default) or "bfloat16", of parameters and computation alike.
      remat: what a decoder's backward pass computes again to save memory: "none" (the default), "dots" (all but the
        products with kernels) or "full" (every layer from its input).

    >>> options: ModelOptions = {"task": "encoder", "dtype": "bfloat16"}
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model_from_config({"model_type": "bert", **sizes}, **options).dtype
    'bfloat16'
    """

    task: str
    num_labels: int | None
    label_names: Sequence[str] | None
    dtype: str
    remat: str


def model_from_config(
    config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs | None = None,
    where: str = "config.json",
    **options: Unpack[ModelOptions],
) -> Model:
    """A model with random parameters: a BERT, RoBERTa, XLM-R, DistilBERT, or a Llama, Mistral, Qwen, Gemma.

    Kernels and embeddings are drawn from N(0, initializer_range²), biases are zero and norms one, as in transformers.

    Args:
      config: the content of config.json, of transformers 4 or 5.
      rngs: where the parameters are drawn from; None is `nnx.Rngs(0)`.
      where: the file that `config` came from, for errors.
      **options: `task`, `num_labels`, `label_names`, `dtype` and `remat`, see `ModelOptions`.

    Returns:
      The model. Called with token ids `[b, t]` it returns logits `[b, num_labels]` for a classification or regression,
      float32 logits `[b, t, vocab_size]` for "causal-lm" and hidden states `[b, t, hidden_size]` for "encoder".

    Raises:
      ValueError: the family, a feature, the task, the dtype or remat is not supported, or labels contradict each other.

    Source: Hugging Face transformers, `AutoModel.from_config`; module and variable names are transformers' own.

    >>> import jax.numpy as jnp
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "bert", **sizes}, num_labels=3)
    >>> model(jnp.array([[1, 2, 3, 4]])).shape
    (1, 3)
    """
    return build_model(Checkpoint(config=config, where=where), rngs=rngs, **options)


def abstract_model(path_or_id: ModelSource, **options: Unpack[ModelOptions]) -> Model:
    """The model of a checkpoint with `jax.ShapeDtypeStruct`s in place of arrays; only config.json is read or fetched.

    Args:
      path_or_id: as in `from_pretrained`.
      **options: `task`, `num_labels`, `label_names`, `dtype` and `remat`, see `ModelOptions`.

    Returns:
      The model, whose variables have shapes and dtypes but no values.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the model is not supported, or labels contradict each other.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=3, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ...     abstract_model(folder, task="causal-lm").model.norm.scale.shape
    (6,)
    """
    checkpoint = open_checkpoint(path_or_id, weights=False)
    return nnx.eval_shape(lambda: build_model(checkpoint, **options))


def build_model(
    checkpoint: Checkpoint,
    *,
    rngs: nnx.Rngs | None = None,
    task: str = "sequence-classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    remat: str = "none",
) -> Model:
    """A model with random parameters for an open checkpoint; arguments and errors are those of `model_from_config`."""
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose from {', '.join(MODEL_DTYPES)}")
    family = checkpoint.family
    _require_offered(family, task, remat)
    described = with_task(checkpoint.config, task, family.architecture_of(task), num_labels, label_names)
    labels = None if task in ("encoder", "causal-lm") else len(label_names_of(described))
    described = with_dtype(described, dtype)
    sizes = checkpoint.sizes
    parts = _parts(sizes, dtype, remat, nnx.Rngs(0) if rngs is None else rngs)
    if labels is not None:
        model = _CLASSIFIERS[family.prefix](parts, labels)
    else:
        model = (_BODIES if task == "encoder" else _LANGUAGE_MODELS)[family.prefix](parts)
    model.config = described
    model.task = task
    model.num_labels = labels
    model.dtype = dtype
    model.max_length = sizes.max_length
    model.name_or_path = ""
    model.folder = ""
    model.load_report = LoadReport()
    lay_out(model, Layout(heads=sizes.num_heads, kv_heads=sizes.num_kv_heads))
    return model


def _parts(sizes: EncoderConfig | DecoderConfig, dtype: str, remat: str, rngs: nnx.Rngs) -> Parts | DecoderParts:
    if isinstance(sizes, DecoderConfig):
        return DecoderParts(sizes, MODEL_DTYPES[dtype], rngs, remat)
    return Parts(sizes, MODEL_DTYPES[dtype], rngs)


def _require_offered(family: Family, task: str, remat: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
    if task not in family.tasks:
        raise ValueError(f"task {task!r} is not offered for {family.model_type}; choose from {', '.join(family.tasks)}")
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is unknown; choose from {', '.join(REMAT)}")
    if remat != "none" and not family.is_decoder:
        raise ValueError(f"remat {remat!r} is not offered for {family.model_type}, only for decoders; leave it out")
