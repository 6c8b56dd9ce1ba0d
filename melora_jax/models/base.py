"""What a model keeps of the Hugging Face checkpoint it came from: configuration, labels, load report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.models.inputs import dropout_on
from melora_jax.nn.sharding import Layout

TASKS = ("sequence-classification", "regression", "encoder", "causal-lm")
MODEL_DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}


class HFConfig(Mapping[str, Any]):
    """The content of a config.json: an immutable, hashable mapping, so that it can be static in a Flax module.

    Two are equal if they hold the same JSON values.

    Args:
      values: what `json.loads` of a config.json gives.

    Raises:
      TypeError: a value is not JSON.

    >>> config = HFConfig({"model_type": "bert", "id2label": {"0": "no", "1": "yes"}})
    >>> config["id2label"]["1"], config == HFConfig(config.to_dict()), hash(config) == hash(HFConfig(config))
    ('yes', True, True)
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._text = json.dumps(dict(values), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """A new plain dict, which may be changed."""
        return json.loads(self._text)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HFConfig) and self._text == other._text

    def __repr__(self) -> str:
        return f"HFConfig({self._text})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `from_pretrained` did in addition to copying tensors. Prints as one line for each kind.

    Attributes:
      files: names of the files read.
      initialised: paths of the variables that the checkpoint lacks and that were drawn at random.
      ignored: (name, reason) of each tensor of the checkpoint that the model does not use.

    >>> print(LoadReport(files=("model.safetensors",), initialised=("classifier/kernel",)))
    read model.safetensors
    drawn at random, to be trained: classifier/kernel
    """

    files: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"read {', '.join(self.files)}"] if self.files else []
        if self.initialised:
            lines.append(f"drawn at random, to be trained: {', '.join(self.initialised)}")
        for reason in dict.fromkeys(reason for _, reason in self.ignored):
            names = [name for name, why in self.ignored if why == reason]
            lines.append(f"left out ({reason}): {', '.join(names)}")
        return "\n".join(lines)


class HuggingFaceModel(nnx.Module):
    """The base class of the models that `from_pretrained` makes.

    Attributes:
      config: the Hugging Face configuration, describing the model as it is (labels, dtype, architecture).
      task: "sequence-classification", "regression", "encoder" or "causal-lm".
      num_labels: size of a classification head's output; None for the other tasks.
      dtype: "float32" or "bfloat16", of parameters and computation.
      max_length: the longest sequence, in tokens.
      name_or_path: the folder or hub id it was loaded from; "" when it was built from a configuration.
      folder: the folder the files were read from (in the hub's cache for a hub id) or the GGUF file; "" when it was
        built from a configuration.
      load_report: what was read, initialised and left out.
      layout: how its variables lie on a mesh.

    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "bert", **sizes}, num_labels=3)
    >>> isinstance(model, HuggingFaceModel), model.task, model.num_labels, model.max_length
    (True, 'sequence-classification', 3, 13)
    """

    config: HFConfig
    task: str
    num_labels: int | None
    dtype: str
    max_length: int
    name_or_path: str
    folder: str
    load_report: LoadReport
    layout: Layout


class SequenceClassifier(HuggingFaceModel):
    """A model with a head over labels."""

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, `[b, labels]`.

        Args:
          input_ids: whole numbers `[b, t]`.
          attention_mask: `[b, t]`, 0 at padding, which for a decoder may be left or right; None without padding.
          token_type_ids: whole numbers `[b, t]`, or None; only BERT and RoBERTa have token types.
          key: PRNG key that turns dropout on; None leaves an outer `dropout_key` in force.

        Raises:
          ValueError: token types are given to a model without them, the sequence is too long, shapes differ, or a known
            id is outside its table.
        """
        with dropout_on(key):
            return self.classify(input_ids, attention_mask, token_type_ids)

    def classify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None
    ) -> jax.Array:
        """The logits, with the dropout key in force."""
        raise NotImplementedError


def label_names_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The label names in config.json, in order; `("LABEL_0", "LABEL_1")`, as in transformers, when it names none.

    Raises:
      ValueError: `id2label` does not count from 0, or contradicts `num_labels`.

    >>> label_names_of({"id2label": {"1": "yes", "0": "no"}}), label_names_of({"num_labels": 1})
    (('no', 'yes'), ('LABEL_0',))
    """
    named, count = config.get("id2label"), config.get("num_labels")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"num_labels={count!r} in config.json must be a whole number of at least 1")
    if not named:
        return _numbered(2 if count is None else count)
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"id2label in config.json must map label numbers to names, not {named!r}")
    if sorted(named) != sorted(str(index) for index in range(len(named))):
        raise ValueError(f"id2label in config.json has keys {sorted(named)}; number the labels from 0 without gaps")
    if count is not None and count != len(named):
        raise ValueError(f"config.json says num_labels={count}, its id2label names {len(named)}; correct one of them")
    return tuple(named[str(index)] for index in range(len(named)))


def with_task(
    config: Mapping[str, Any], task: str, architecture: str, num_labels: int | None, label_names: Sequence[str] | None
) -> HFConfig:
    """The configuration of a model for `task`, from that of a checkpoint: labels, problem type and architecture set.

    Args:
      config: the checkpoint's configuration.
      task: one of TASKS.
      architecture: the Hugging Face class of the model.
      num_labels: outputs of the head; None keeps those of `config` (1 for regression).
      label_names: one name for each label; None keeps those of `config` if their number fits.

    Raises:
      ValueError: the numbers of labels contradict each other.
    """
    values = dict(config) | {"architectures": [architecture]}
    values.pop("num_labels", None)
    if task in ("encoder", "causal-lm"):
        if num_labels is not None or label_names is not None:
            kind = "an encoder" if task == "encoder" else "a language model"
            raise ValueError(f"{kind} has no labels; leave num_labels and label_names out, or choose another task")
        return HFConfig(values)
    names = _labels_for(config, task, num_labels, label_names)
    values["id2label"] = {str(index): name for index, name in enumerate(names)}
    values["label2id"] = {name: index for index, name in enumerate(names)}
    if task == "regression":
        values["problem_type"] = "regression"
    elif len(names) > 1 and config.get("problem_type") == "regression":
        values.pop("problem_type")
    return HFConfig(values)


def with_dtype(config: HFConfig, dtype: str) -> HFConfig:
    """The configuration with its dtype set, under the key that its transformers version uses (4: `torch_dtype`)."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return HFConfig(config.to_dict() | {key: dtype})


def _labels_for(
    config: Mapping[str, Any], task: str, num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[str, ...]:
    if task == "regression":
        if num_labels not in (None, 1):
            raise ValueError(f"regression has one output, not num_labels={num_labels}; leave num_labels out")
        num_labels = 1
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1; give the number of classes, or 1 for regression")
    if label_names is not None:
        names = tuple(label_names)
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"label_names {list(names)} must be distinct and not empty")
        if num_labels not in (None, len(names)):
            raise ValueError(f"num_labels={num_labels} but {len(names)} label_names; give one name a label")
        return names
    stored = label_names_of(config)
    return stored if num_labels in (None, len(stored)) else _numbered(num_labels)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))
