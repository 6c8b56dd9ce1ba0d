"""The supported model families: their modules, heads and tasks, and which tensors of a checkpoint they use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

_LEGACY = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model family names its modules.

    Attributes:
      model_type: `model_type` in config.json.
      prefix: the attribute that holds the body in a model with a head.
      architecture: the beginning of class names in `architectures`.
      body: the body's own top modules.
      head: the modules of a sequence classification head.
      pools: whether the body of a classifier has a pooler.
      tasks: what a model of this family can be loaded for.
      body_architecture: the beginning of the class names of body and classifier, if another than `architecture`.
    """

    model_type: str
    prefix: str
    architecture: str
    body: tuple[str, ...] = ("embeddings", "encoder", "pooler")
    head: tuple[str, ...] = ("classifier",)
    pools: bool = False
    tasks: tuple[str, ...] = ("sequence-classification", "regression", "encoder")
    body_architecture: str | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it models language from left to right."""
        return "causal-lm" in self.tasks

    def architecture_of(self, task: str) -> str:
        """The Hugging Face class that `task` corresponds to."""
        if task == "causal-lm":
            return f"{self.architecture}ForCausalLM"
        end = "Model" if task == "encoder" else "ForSequenceClassification"
        return (self.body_architecture or self.architecture) + end

    def canonical(self, key: str, task: str) -> str:
        """A checkpoint's tensor name as Hugging Face spells it today for the model of `task`.

        >>> FAMILIES["bert"].canonical("embeddings.LayerNorm.gamma", "sequence-classification")
        'bert.embeddings.LayerNorm.weight'
        """
        stem, _, leaf = key.rpartition(".")
        if stem.endswith(("LayerNorm", "layer_norm")):
            leaf = _LEGACY.get(leaf, leaf)
        name = ".".join(filter(None, (stem, leaf))).removeprefix(f"{self.prefix}.")
        in_body = name.split(".")[0] in self.body
        return f"{self.prefix}.{name}" if in_body and task != "encoder" else name

    def sorted_out(
        self, keys: Iterable[str], task: str, architectures: tuple[str, ...]
    ) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
        """A checkpoint's tensors by what becomes of them in the model of `task`.

        Args:
          keys: the names that they have in the checkpoint.
          task: the model's.
          architectures: those in config.json, which tell whose head a `classifier` is.

        Returns:
          The canonical name of each tensor that is of use, by its key, and (key, reason) of those that are left out.
        """
        names = {key: self.canonical(key, task) for key in sorted(keys)}
        reasons = {key: self.ignorable(name, task, architectures) for key, name in names.items()}
        ignored = tuple((key, reason) for key, reason in reasons.items() if reason)
        return {key: name for key, name in names.items() if not reasons[key]}, ignored

    def ignorable(self, name: str, task: str, architectures: tuple[str, ...]) -> str | None:
        """Why the tensor with the canonical name `name` may be left out of the model of `task`; None if it may not."""
        for pattern, reason in _DECODER_EXTRAS if self.is_decoder else _EXTRAS:
            if re.match(pattern, name):
                return reason
        top = name.split(".")[0]
        if self.is_decoder and top == "lm_head":
            return None if task == "causal-lm" else "head of another task"
        if top in self.head and (task in ("encoder", "causal-lm") or has_other_head(architectures)):
            return "head of another task"
        if name.startswith(f"{self.prefix}.pooler.") and not self.pools:
            return "pooler, which this family's classifier does not use"
        return None


_EXTRAS = (
    (r"(\w+\.)?embeddings\.(position_ids|token_type_ids)$", "buffer, computed on the fly"),
    (r"(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\.", "pretraining head"),
    (r"qa_outputs\.", "question answering head"),
)
_DECODER_EXTRAS = (
    (r"(\w+\.)*rotary_emb\.inv_freq$", "buffer, computed on the fly"),
    (r"qa_outputs\.", "head of another task"),
)


def has_other_head(architectures: tuple[str, ...]) -> bool:
    """Whether config.json's `architectures` name a head that is not for sequence classification.

    >>> has_other_head(("BertForTokenClassification",)), has_other_head(("BertModel",))
    (True, False)
    """
    return any("For" in name and not name.endswith("ForSequenceClassification") for name in architectures)


def _decoder(model_type: str, architecture: str, body_architecture: str | None = None) -> Family:
    return Family(
        model_type=model_type,
        prefix="model",
        architecture=architecture,
        body_architecture=body_architecture,
        body=("embed_tokens", "layers", "norm"),
        head=("score",),
        tasks=("causal-lm", "sequence-classification", "regression", "encoder"),
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="bert", prefix="bert", architecture="Bert", pools=True),
        Family(model_type="roberta", prefix="roberta", architecture="Roberta"),
        Family(model_type="xlm-roberta", prefix="roberta", architecture="XLMRoberta"),
        Family(
            model_type="distilbert",
            prefix="distilbert",
            architecture="DistilBert",
            body=("embeddings", "transformer"),
            head=("pre_classifier", "classifier"),
        ),
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _decoder("gemma2", "Gemma2"),
        _decoder("gemma3_text", "Gemma3", "Gemma3Text"),
    )
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that config.json's `model_type` names.

    Raises:
      ValueError: there is none, or it is not supported.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise ValueError(
            f"model_type 'gemma3' in {where} is the model of images and text, which is not supported; choose a"
            " checkpoint of text alone, gemma3_text"
        )
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type {model_type!r} in {where} is not supported; choose a checkpoint of {known}")
    return FAMILIES[model_type]
