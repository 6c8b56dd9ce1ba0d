"""Random decoders that do not repeat themselves: what the tests of generation, of its command and of lm-eval run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from melora_jax.models.decoders.heads import CausalLM
from melora_jax.nn.tree import variables_of
from tests.support.chat import CHATML, byte_tokenizer
from tests.support.decoder_fixtures import random_decoder

BYTES = byte_tokenizer(CHATML)
LONG: dict[str, Any] = {"max_position_embeddings": 97, "eos_token_id": None}


def lively(name: str = "smollm2", changes: Mapping[str, Any] | None = None) -> CausalLM:
    """A random model that does not say the same again and again."""
    model = random_decoder(name, LONG | (changes or {}))
    for path, variable in variables_of(model).items():
        if not path.endswith("/scale"):
            variable.set_value(variable.get_value() * (0.3 if "embed" in path else 5.0))
    return model


def talker() -> CausalLM:
    """A random Llama of one layer that writes ASCII alone: the logits of other tokens are 0."""
    model = lively(changes={"vocab_size": len(BYTES), "num_hidden_layers": 1})
    embedding = variables_of(model)["model/embed_tokens/embedding"]
    texts = map(BYTES.decode, range(len(BYTES)))
    others = [
        number for number, text in enumerate(texts) if number > 255 or not (text.isascii() and text.isprintable())
    ]
    embedding.set_value(embedding.get_value().at[jnp.array(others)].set(0.0))
    return model
