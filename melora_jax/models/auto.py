"""The model for a Hugging Face configuration and a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx

from melora_jax.models.base import LoadReport, label_names_of, with_dtype, with_task
from melora_jax.models.decoders.config import DecoderConfig, decoder_config
from melora_jax.models.decoders.heads import CausalLM, DecoderForSequenceClassification
from melora_jax.models.decoders.layers import DecoderParts
from melora_jax.models.decoders.model import REMAT, DecoderModel
from melora_jax.models.encoders.bert import BertModel
from melora_jax.models.encoders.config import EncoderConfig, Parts, encoder_config
from melora_jax.models.encoders.distilbert import DistilBertModel
from melora_jax.models.encoders.heads import (
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    RobertaForSequenceClassification,
)
from melora_jax.models.hub.names import Family, family_of
from melora_jax.models.hub.placement import lay_out
from melora_jax.nn.sharding import Layout

Classifier: TypeAlias = (
    BertForSequenceClassification
    | RobertaForSequenceClassification
    | DistilBertForSequenceClassification
    | DecoderForSequenceClassification
)
Model: TypeAlias = Classifier | BertModel | DistilBertModel | CausalLM | DecoderModel

DTYPES = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}

_BODIES: dict[str, Callable[[Parts], Model]] = {
    "bert": BertModel,
    "roberta": BertModel,
    "distilbert": DistilBertModel,
}
_CLASSIFIERS: dict[str, Callable[[Parts, int], Model]] = {
    "bert": BertForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
}


def model_from_config(
    config: Mapping[str, Any],
    *,
    task: str = "sequence-classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    remat: str = "none",
    rngs: nnx.Rngs | None = None,
    where: str = "config.json",
) -> Model:
    """A model with random parameters, N(0, initializer_range²), from a Hugging Face configuration.

    Args:
      config: the content of a config.json of transformers 4 or 5; encoders are BERT, RoBERTa, XLM-R and DistilBERT,
        decoders Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 (text), and SmolLM, which is a Llama.
      task: "sequence-classification", "regression" (one output) or "encoder" (no head); for decoders "causal-lm" too.
      num_labels: outputs of the head; None takes their number from `config`.
      label_names: a name for each label; None takes them from `config`.
      dtype: "float32" or "bfloat16", of parameters and computation alike.
      remat: what a decoder's backward pass computes again to save memory: "none", "dots" (all but the products with
        kernels) or "full" (every layer from its input).
      rngs: where the parameters are drawn from; None is `nnx.Rngs(0)`.
      where: the file that `config` came from, for errors.

    Raises:
      ValueError: the family, a feature, the task, the dtype or remat is not supported, or labels contradict each other.

    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "bert", **sizes}, num_labels=3)
    >>> model(jnp.array([[1, 2, 3, 4]])).shape
    (1, 3)
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}")
    family = family_of(config, where)
    described = with_dtype(with_task(config, task, family.architecture_of(task), num_labels, label_names), dtype)
    _require_offered(family, task, remat)
    labels = None if task in ("encoder", "causal-lm") else len(label_names_of(described))
    sizes = sizes_of(config, where)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if isinstance(sizes, DecoderConfig):
        model = _decoder(DecoderParts(sizes, DTYPES[dtype], rngs), task, labels, remat)
    else:
        model = _encoder(Parts(sizes, DTYPES[dtype], rngs), family, labels)
    model.config = described
    model.task = task
    model.num_labels = labels
    model.dtype = dtype
    model.max_length = sizes.max_length
    model.name_or_path = ""
    model.folder = ""
    model.load_report = LoadReport()
    lay_out(model, _layout_of(sizes))
    return model


def _layout_of(sizes: EncoderConfig | DecoderConfig) -> Layout:
    kv_heads = sizes.num_kv_heads if isinstance(sizes, DecoderConfig) else sizes.num_heads
    return Layout(heads=sizes.num_heads, kv_heads=kv_heads)


def sizes_of(config: Mapping[str, Any], where: str) -> EncoderConfig | DecoderConfig:
    """The hyperparameters in a Hugging Face configuration of any supported family.

    Args:
      config: the content of config.json.
      where: its file, for errors.

    Raises:
      ValueError: it is not supported, or a value is missing or impossible.
    """
    return (decoder_config if family_of(config, where).is_decoder else encoder_config)(config, where)


def _require_offered(family: Family, task: str, remat: str) -> None:
    if task not in family.tasks:
        raise ValueError(f"task {task!r} is not offered for {family.model_type}; choose from {', '.join(family.tasks)}")
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is unknown; choose from {', '.join(REMAT)}")
    if remat != "none" and not family.is_decoder:
        raise ValueError(f"remat {remat!r} is not offered for {family.model_type}, only for decoders; leave it out")


def _encoder(parts: Parts, family: Family, labels: int | None) -> Model:
    return _BODIES[family.prefix](parts) if labels is None else _CLASSIFIERS[family.prefix](parts, labels)


def _decoder(parts: DecoderParts, task: str, labels: int | None, remat: str) -> Model:
    if labels is not None:
        return DecoderForSequenceClassification(parts, labels, remat=remat)
    return DecoderModel(parts, remat=remat) if task == "encoder" else CausalLM(parts, remat=remat)
