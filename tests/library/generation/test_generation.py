"""Generation against transformers' own, and what it promises of batches, padding, streaming, compiling and errors."""

from __future__ import annotations

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.generation import stream
from melora_jax.generation.decode_loop import programs
from melora_jax.models.decoders.heads import CausalLM
from melora_jax.nn.tree import variables_of
from tests.support.decoder_fixtures import CONFIGS, VOCAB, apply, torch_decoder
from tests.support.models_fixtures import tensors_of, write_checkpoint
from tests.support.talkers import LONG, lively
from tests.support.tiny import stirred

NEW = 64
SHORT = 7
DRAWN = {"temperature": 0.4, "key": jax.random.key(3)}
ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return lively(changes=ONE_LAYER)


def prompts(lengths: tuple[int, ...] = (7, 3, 11)) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts, padded left `[3, 11]`, and their mask."""
    mask = (np.arange(max(lengths))[::-1] < np.array(lengths)[:, None]).astype(np.int32)
    ids = np.random.default_rng(5).integers(3, VOCAB, mask.shape).astype(np.int32)
    return ids * mask, mask


@pytest.fixture
def traces(monkeypatch):
    """Counts how often a forward pass is traced, which is once for each program that is compiled."""
    count = []
    advance = CausalLM.advance

    def counted(*args, **kwargs):
        count.append(1)
        return advance(*args, **kwargs)

    monkeypatch.setattr(CausalLM, "advance", counted)
    programs.cache_clear()
    yield count
    programs.cache_clear()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_greedy_equals_transformers_token_by_token(tmp_path, name):
    """A left-padded batch, and twelve times as many new tokens as the window of those families that have one."""
    import torch

    model = lively(name)
    write_checkpoint(tmp_path, CONFIGS[name] | LONG, tensors_of(model))
    reference, _ = torch_decoder(tmp_path)
    ids, mask = prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[:, ids.shape[1] :].numpy()
    assert min(len(set(row)) for row in expected.tolist()) > 10
    found = mj.generate(mj.from_pretrained(tmp_path, task="causal-lm"), ids, mask, max_new_tokens=NEW)
    np.testing.assert_array_equal(found.tokens, expected)
    assert not found.stopped.any()
    assert found.lengths.tolist() == [NEW] * 3


@pytest.mark.slow
def test_greedy_equals_the_likeliest_token_of_the_whole_sequence(model):
    """The same without torch or a cache: each new token is the argmax after all tokens before it."""
    ids, mask = prompts()
    found = mj.generate(model, ids, mask, max_new_tokens=SHORT)
    whole = np.concatenate([ids, found.tokens], axis=1)
    logits = apply(model, whole, np.pad(mask, ((0, 0), (0, SHORT)), constant_values=1))
    np.testing.assert_array_equal(found.tokens, np.asarray(logits).argmax(-1)[:, ids.shape[1] - 1 : -1])


@pytest.mark.parametrize("settings", [{}, DRAWN])
def test_padding_and_the_rest_of_the_batch_do_not_matter(model, settings):
    ids, mask = prompts()
    together = mj.generate(model, ids, mask, max_new_tokens=SHORT, **settings)
    right = [np.concatenate([row[seen == 1], row[seen == 0]]) for row, seen in zip(ids, mask, strict=True)]
    found = mj.generate(model, np.array(right), np.sort(mask)[:, ::-1], max_new_tokens=SHORT, **settings)
    np.testing.assert_array_equal(found.tokens, together.tokens)
    others = np.concatenate([ids[:2], (ids[2:] + 1) % VOCAB])
    found = mj.generate(model, others, mask, max_new_tokens=SHORT, **settings)
    np.testing.assert_array_equal(found.tokens[:2], together.tokens[:2])
    assert found.tokens[2].tolist() != together.tokens[2].tolist()
    alone = mj.generate(model, ids[:1][mask[:1] == 1][None], max_new_tokens=SHORT, **settings)
    np.testing.assert_array_equal(alone.tokens, together.tokens[:1])


def test_drawn_tokens_depend_on_the_key_the_row_and_the_place_alone(model):
    ids = np.tile(prompts()[0][:1], (3, 1))

    def drawn(seed: int) -> list[list[int]]:
        return mj.generate(model, ids, max_new_tokens=SHORT, temperature=2.0, key=jax.random.key(seed)).tokens.tolist()

    first = drawn(0)
    assert drawn(0) == first
    assert drawn(1) != first
    assert len({tuple(row) for row in first}) == 3
    assert all(len(set(row)) > 2 for row in first)


@pytest.mark.parametrize("settings", [{}, DRAWN])
def test_a_stream_yields_what_generate_returns(model, settings):
    ids, mask = prompts()
    whole = mj.generate(model, ids, mask, max_new_tokens=SHORT, **settings)
    ends = int(whole.tokens[0, 3])
    arguments = {"max_new_tokens": SHORT, "eos_token_id": ends, "pad_token_id": 1, **settings}
    whole = mj.generate(model, ids, mask, **arguments)
    steps = list(stream(model, ids, mask, **arguments))
    np.testing.assert_array_equal(np.stack([step.tokens for step in steps], axis=1), whole.tokens)
    np.testing.assert_array_equal(steps[-1].stopped, whole.stopped)
    alone = list(stream(model, ids[:1], mask[:1], **arguments))
    assert [step.stopped.tolist() for step in alone] == [[False]] * 3 + [[True]]
    early = stream(model, ids, mask, **arguments)
    np.testing.assert_array_equal(next(early).tokens, whole.tokens[:, 0])
    early.close()


@pytest.mark.parametrize("settings", [{}, DRAWN])
def test_a_stream_goes_on_with_the_rows_that_it_is_sent(model, settings):
    ids, mask = prompts()
    arguments = {"max_new_tokens": SHORT, "eos_token_id": (), **settings}
    whole = mj.generate(model, ids, mask, **arguments).tokens
    steps = stream(model, ids, mask, **arguments)
    found = [next(steps).tokens, steps.send([2, 0, 2]).tokens, next(steps).tokens, steps.send([1]).tokens]
    expected = [whole[:, 0], whole[[2, 0, 2], 1], whole[[2, 0, 2], 2], whole[[0], 3]]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [step.tokens.tolist() for step in steps] == [[token] for token in whole[0, 4:].tolist()]


@pytest.mark.parametrize("rows", [[], [3], [-1], [[0]]])
def test_rows_that_there_are_none_of_are_refused(model, rows):
    ids, mask = prompts()
    steps = stream(model, ids, mask, max_new_tokens=SHORT, eos_token_id=())
    next(steps)
    with pytest.raises(ValueError, match="to continue: give at least one row number, each from 0 to 2"):
        steps.send(rows)


def test_a_row_ends_at_its_first_end_token_and_the_others_go_on(model):
    ids, mask = prompts()
    free = mj.generate(model, ids, mask, max_new_tokens=SHORT).tokens
    ends = [int(free[0, 2]), int(free[1, 4])]
    found = mj.generate(model, ids, mask, max_new_tokens=SHORT, eos_token_id=ends, pad_token_id=1)
    lengths = [next((n + 1 for n, token in enumerate(row) if token in ends), SHORT) for row in free.tolist()]
    assert lengths[0] == 3
    assert found.lengths.tolist() == lengths
    assert found.stopped.tolist() == [bool(set(row) & set(ends)) for row in free.tolist()]
    for row, length in enumerate(lengths):
        assert found.tokens[row].tolist() == free[row, :length].tolist() + [1] * (max(lengths) - length)
    only = mj.generate(model, ids[:1], mask[:1], max_new_tokens=SHORT, eos_token_id=ends)
    assert only.tokens.tolist() == free[:1, :3].tolist()


def test_end_tokens_come_from_the_checkpoint(tmp_path, model):
    """generation_config.json has the last word: a chat model's config.json may name another token."""
    ids, mask = prompts()
    free = mj.generate(model, ids, mask, max_new_tokens=SHORT).tokens
    own, chat = int(free[0, 5]), int(free[0, 2])
    config = CONFIGS["smollm2"] | LONG | ONE_LAYER | {"eos_token_id": own, "pad_token_id": -1}
    write_checkpoint(tmp_path, config, tensors_of(model))

    def length() -> int:
        loaded = mj.from_pretrained(tmp_path, task="causal-lm")
        return int(mj.generate(loaded, ids[:1], mask[:1], max_new_tokens=SHORT).lengths[0])

    assert length() == 6
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [99, chat]}))
    assert length() == 3
    loaded = mj.from_pretrained(tmp_path, task="causal-lm")
    assert mj.generate(loaded, ids[:1], mask[:1], max_new_tokens=SHORT, eos_token_id=()).lengths.tolist() == [SHORT]
    mj.save_pretrained(loaded, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {"eos_token_id": [99, chat]}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        mj.generate(loaded, ids, mask, max_new_tokens=SHORT)


@pytest.mark.slow
def test_an_adapted_model_generates_like_its_merged_model():
    adapted = lively(changes=ONE_LAYER)
    ids, mask = prompts()
    before = mj.generate(adapted, ids, mask, max_new_tokens=SHORT).tokens
    mj.adapt(adapted, mj.MELoRAConfig(n=2, r=1, targets=["q_proj", "v_proj"], dropout=0.5), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(mj.generate(adapted, ids, mask, max_new_tokens=SHORT).tokens, before)
    stirred(adapted)
    with mj.dropout_key(jax.random.key(0)):
        found = mj.generate(adapted, ids, mask, max_new_tokens=SHORT).tokens
    assert (found != before).any()
    np.testing.assert_array_equal(mj.generate(mj.merge(adapted), ids, mask, max_new_tokens=SHORT).tokens, found)


def test_what_is_compiled_is_used_again(traces):
    """Prompts of similar length, new weights and new settings run the programs of the first call."""
    model, draw = lively(changes=ONE_LAYER), {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    ids, mask = prompts()
    first = mj.generate(model, ids, mask, max_new_tokens=SHORT)
    assert len(traces) == 2  # the prompt and the loop
    mj.generate(model, ids[:, 3:], mask[:, 3:], max_new_tokens=SHORT + 2, eos_token_id=5)
    variable = variables_of(model)["model/norm/scale"]
    variable.set_value(-variable.get_value())
    assert mj.generate(model, ids, mask, max_new_tokens=SHORT).tokens.tolist() != first.tokens.tolist()
    mj.generate(lively(changes=ONE_LAYER), ids, mask, max_new_tokens=SHORT)
    assert len(traces) == 2
    list(stream(model, ids, mask, max_new_tokens=SHORT))
    list(stream(model, ids, mask, max_new_tokens=SHORT + 1))
    assert len(traces) == 3  # one further token
    mj.generate(model, ids, mask, max_new_tokens=SHORT, **draw, key=jax.random.key(0))
    assert len(traces) == 5
    changed = {name: value / 5 if name != "top_k" else 3 for name, value in draw.items()}
    mj.generate(model, ids, mask, max_new_tokens=SHORT, **changed, key=jax.random.key(1))
    assert len(traces) == 5


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"input_ids": np.zeros((2, 0), np.int32), "attention_mask": None}, "row 0 has no tokens"),
    "only padding": ({"attention_mask": [[1] * 5, [0] * 5]}, "row 1 has no tokens; start it with"),
    "no rows": ({"input_ids": np.zeros((0, 3), np.int32), "attention_mask": None}, "0 rows"),
    "ragged": ({"input_ids": [[1, 2], [3]], "attention_mask": None}, "rows of unequal length; pad"),
    "not whole": ({"input_ids": [[0.5]]}, "whole numbers of shape"),
    "mask of another shape": ({"attention_mask": [[1, 1]]}, "attention_mask have shape"),
    "outside the vocabulary": ({"input_ids": [[VOCAB] * 5] * 2}, "vocab_size is 101; use the tokenizer"),
    "past the context": (
        {"max_new_tokens": 93},
        r"row 0 has 5 tokens; with max_new_tokens=93 .* context of 97; .* at most 92",
    ),
    "prompt past the context": (
        {"input_ids": np.ones((1, 97), np.int32), "attention_mask": None},
        "shorten it to fewer than 97",
    ),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
    "temperature below 0": ({"temperature": -0.1}, "temperature=-0.1 must be a number of at least 0"),
    "top_k 0": ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be"),
    "top_p 0": ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be a number above 0 and at most 1"),
    "top_p over 1": ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1 must be"),
    "a filter and nothing drawn": ({"top_p": 0.9}, "temperature=0 always takes the likeliest; set temperature"),
    "no key": ({"temperature": 1.0}, "needs a key; give one, such as"),
    "end outside the vocabulary": ({"eos_token_id": [5, 101]}, "eos_token_id=101 must be a token .* to 100"),
    "end no token": ({"eos_token_id": "5"}, "eos_token_id='5' must be a token"),
    "padding outside": ({"pad_token_id": -1}, "pad_token_id=-1 must be a token"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [mj.generate, stream])
def test_bad_input_is_found_before_any_work(model, traces, function, case):
    changes, says = CASES[case]
    arguments = {"input_ids": [[3] * 5] * 2, "attention_mask": [[1] * 5] * 2, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=says):
        function(model, **arguments)
    assert not traces


def test_a_model_that_does_not_generate_is_refused():
    with pytest.raises(ValueError, match="Linear does not generate; load a decoder with"):
        mj.generate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), [[1]], max_new_tokens=2)


@pytest.mark.parametrize("whole", [True, False])
def test_logits_that_are_no_numbers_end_in_an_error(whole):
    model = lively(changes=ONE_LAYER)
    variable = variables_of(model)["model/norm/scale"]
    variable.set_value(jnp.full_like(variable.get_value(), jnp.nan))
    with pytest.raises(ValueError, match="logits are NaN"):
        mj.generate(model, [[3]], max_new_tokens=2) if whole else list(stream(model, [[3]], max_new_tokens=2))
