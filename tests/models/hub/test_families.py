"""Names and layouts of torch tensors and Flax variables."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from melora_jax.models.families import FAMILIES
from melora_jax.models.hub.names import flax_from_torch, torch_from_flax, torch_name, torch_shape

module = st.sampled_from(["bert", "layer", "3", "attention", "self", "query", "LayerNorm", "out_proj"])
stems = st.lists(module, min_size=1, max_size=6)


def matrices(dims: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(1, 5), min_size=dims, max_size=dims).flatmap(
        lambda shape: arrays(np.float32, tuple(shape), elements=st.floats(-1, 1, width=32))
    )


@given(stem=stems, leaf=st.sampled_from([("kernel", 2), ("bias", 1), ("scale", 1)]), data=st.data())
def test_there_and_back_is_the_identity(stem, leaf, data):
    path, array = "/".join([*stem, leaf[0]]), data.draw(matrices(leaf[1]))
    name, tensor = torch_from_flax(path, array)
    assert tensor.shape == torch_shape(path, array.shape)
    found, back = flax_from_torch(name, tensor)
    assert found == path
    np.testing.assert_array_equal(back, array, strict=True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("classifier/dense/kernel", "classifier.dense.weight"),
        ("bert/encoder/layer/3/attention/self/query/bias", "bert.encoder.layer.3.attention.self.query.bias"),
        ("roberta/embeddings/LayerNorm/scale", "roberta.embeddings.LayerNorm.weight"),
        ("distilbert/transformer/layer/0/sa_layer_norm/scale", "distilbert.transformer.layer.0.sa_layer_norm.weight"),
        ("embeddings/word_embeddings/embedding", "embeddings.word_embeddings.weight"),
        ("model/embed_tokens/embedding", "model.embed_tokens.weight"),
    ],
)
def test_names(path, name):
    array = np.ones((3, 5) if path.endswith(("kernel", "embedding")) else 3)
    assert torch_name(path) == name
    found, tensor = torch_from_flax(path, array)
    assert (found, tensor.shape) == (name, (5, 3) if path.endswith("kernel") else array.shape)
    assert flax_from_torch(name, tensor)[0] == path


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(ValueError, match="query/base/a has no Hugging Face name"):
        torch_from_flax("query/base/a", np.ones((2, 3)))
    with pytest.raises(ValueError, match=re.escape("query/kernel has shape (2, 3, 5); a dense kernel is a matrix")):
        torch_from_flax("query/kernel", np.ones((2, 3, 5)))
    with pytest.raises(ValueError, match=re.escape("conv.weight of shape (2, 3, 5) has no Flax path")):
        flax_from_torch("conv.weight", np.ones((2, 3, 5)))
    with pytest.raises(ValueError, match=r"embeddings.position_ids of shape \(1, 5\) has no Flax path"):
        flax_from_torch("embeddings.position_ids", np.ones((1, 5)))


@pytest.mark.parametrize(
    ("family", "task", "key", "name"),
    [
        ("bert", "regression", "embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert", "encoder", "bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("bert", "encoder", "bert.pooler.dense.weight", "pooler.dense.weight"),
        ("bert", "regression", "classifier.weight", "classifier.weight"),
        ("xlm-roberta", "regression", "roberta.encoder.layer.0.output.dense.bias", None),
        (
            "distilbert",
            "regression",
            "transformer.layer.0.ffn.lin1.bias",
            "distilbert.transformer.layer.0.ffn.lin1.bias",
        ),
        ("bert", "regression", "gamma", "gamma"),
        ("bert", "regression", "encoder.gamma", "bert.encoder.gamma"),
    ],
)
def test_canonical_names(family, task, key, name):
    assert FAMILIES[family].canonical(key, task) == (name or key)
