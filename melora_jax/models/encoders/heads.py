"""Sequence classification heads on the first token, module for module as Hugging Face names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.core.dropout import dropout
from melora_jax.models.base import SequenceClassifier
from melora_jax.models.encoders.bert import BertBody, BertModel
from melora_jax.models.encoders.config import Parts
from melora_jax.models.encoders.distilbert import DistilBertModel


class BertForSequenceClassification(SequenceClassifier):
    """BERT with a dense layer on the pooled first token."""

    def __init__(self, parts: Parts, num_labels: int) -> None:
        self.head_dropout = parts.config.head_dropout
        self.bert = BertModel(parts, prefix="bert/")
        self.classifier = parts.linear(parts.config.hidden_size, num_labels)

    def classify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None
    ) -> jax.Array:
        hidden = self.bert(input_ids, attention_mask, token_type_ids)
        return self.classifier(dropout(self.bert.pooler(hidden), self.head_dropout, "classifier"))


class RobertaClassificationHead(nnx.Module):
    """Two dense layers with tanh between them, on the first token."""

    def __init__(self, parts: Parts, num_labels: int) -> None:
        self.head_dropout = parts.config.head_dropout
        self.dense = parts.linear(parts.config.hidden_size, parts.config.hidden_size)
        self.out_proj = parts.linear(parts.config.hidden_size, num_labels)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = dropout(hidden[:, 0], self.head_dropout, "classifier")
        x = dropout(jnp.tanh(self.dense(x)), self.head_dropout, "classifier")
        return self.out_proj(x)


class RobertaForSequenceClassification(SequenceClassifier):
    """RoBERTa or XLM-R with its classification head."""

    def __init__(self, parts: Parts, num_labels: int) -> None:
        self.roberta = BertBody(parts, prefix="roberta/")
        self.classifier = RobertaClassificationHead(parts, num_labels)

    def classify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None
    ) -> jax.Array:
        return self.classifier(self.roberta(input_ids, attention_mask, token_type_ids))


class DistilBertForSequenceClassification(SequenceClassifier):
    """DistilBERT with two dense layers, relu between them, on the first token."""

    def __init__(self, parts: Parts, num_labels: int) -> None:
        self.head_dropout = parts.config.head_dropout
        self.distilbert = DistilBertModel(parts, prefix="distilbert/")
        self.pre_classifier = parts.linear(parts.config.hidden_size, parts.config.hidden_size)
        self.classifier = parts.linear(parts.config.hidden_size, num_labels)

    def classify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None
    ) -> jax.Array:
        hidden = self.distilbert(input_ids, attention_mask, token_type_ids)
        x = jax.nn.relu(self.pre_classifier(hidden[:, 0]))
        return self.classifier(dropout(x, self.head_dropout, "classifier"))
