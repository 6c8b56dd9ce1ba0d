"""Tiny Hugging Face checkpoints of every family, with sizes that no transposed or swapped axis can pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.files.safetensors_io import write_tensors
from melora_jax.models import Model, model_from_config
from melora_jax.models.hub.names import torch_from_flax
from melora_jax.nn.tree import variables_of

_BERT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 17,
    "type_vocab_size": 5,
    "hidden_dropout_prob": 0.11,
    "attention_probs_dropout_prob": 0.13,
    "layer_norm_eps": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT, "pad_token_id": 0, "classifier_dropout": 0.19},
    "roberta": {"model_type": "roberta", **_BERT, "pad_token_id": 1},
    "xlm-roberta": {"model_type": "xlm-roberta", **_BERT, "pad_token_id": 3, "hidden_act": "gelu_new"},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 101,
        "dim": 21,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 37,
        "max_position_embeddings": 17,
        "dropout": 0.11,
        "attention_dropout": 0.13,
        "seq_classif_dropout": 0.23,
        "pad_token_id": 0,
    },
}
FAMILIES = list(CONFIGS)


def batch(family: str) -> dict[str, np.ndarray]:
    """Token ids [3, 11] with 0, 4 and 9 tokens of padding, their mask, and token types where the family has them."""
    rng = np.random.default_rng(7)
    pad = CONFIGS[family]["pad_token_id"]
    mask = (np.arange(11)[None] < np.array([[11], [7], [2]])).astype(np.int32)
    ids = np.where(mask == 1, rng.integers(4, 101, (3, 11)), pad).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family != "distilbert":
        inputs["token_type_ids"] = rng.integers(0, 5, (3, 11)).astype(np.int32)
    return inputs


def random_model(family: str, **arguments: Any) -> Model:
    """A model with every variable, biases and norms too, drawn at random."""
    model = nnx.eval_shape(lambda: model_from_config(CONFIGS[family], **arguments))
    rng = np.random.default_rng(11)
    for path, variable in sorted(variables_of(model).items()):
        drawn = 0.3 * rng.standard_normal(variable.shape) + (1.0 if path.endswith("/scale") else 0.0)
        variable.set_value(jnp.asarray(drawn, variable.dtype))
    return model


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """A model's tensors, by Hugging Face name and in torch's layout."""
    return dict(torch_from_flax(path, np.asarray(value.get_value())) for path, value in variables_of(model).items())


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def torch_model(family: str, task: str, labels: int = 2) -> Any:
    """transformers' model of the same configuration with every parameter drawn at random, in evaluation mode."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {key: value for key, value in CONFIGS[family].items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(family, **values, num_labels=labels)
        auto = transformers.AutoModel if task == "encoder" else transformers.AutoModelForSequenceClassification
        model = auto.from_config(config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(1.0 if is_scale else 0.0, 0.3, generator=generator)
    return model


def torch_output(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits, or the last hidden states of a model without a head."""
    import torch

    with torch.no_grad():
        output = model(**{name: torch.from_numpy(value).long() for name, value in inputs.items()})
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def torch_load(folder: Path, task: str) -> tuple[Any, dict[str, Any]]:
    """transformers' model from a folder, and what it says of missing, unexpected and mismatched tensors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModel if task == "encoder" else transformers.AutoModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info
