"""A model as lm-eval sees it: the log-likelihoods of a plain forward pass and of lm-eval's own torch model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

import melora_jax as mj
from tests.support.chat import CHATML, byte_tokenizer, space_tokenizer
from tests.support.simulated import environment
from tests.support.talkers import BYTES, lively
from tests.support.tiny import stirred
from train.harness.batches import Pair, common_length, make_batches, rounded_up
from train.harness.model import JaxLM, manner_of
from train.harness.scoring import Scorer
from train.run_folder.errors import RunError

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"vocab_size": len(BYTES), "num_hidden_layers": 1, "max_position_embeddings": 193}
PREFIX = "ab a: abé " * 16
FEW_SHOT = [(PREFIX + end, choice) for end in ("a", "b: ", "aé", "ba") for choice in (" a", " b", " ab: b")]
LONELY = [("ab", "é ab"), ("", "ab a"), ("b ", " a"), ("a" * 230, "ab"), ("b", "ab" * 40)]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]  # pyright: ignore[reportArgumentType]


def talkative(**changes: Any) -> Any:
    """A random Smollm2 of one layer, with an adapter whose factors count."""
    model = lively(changes=SIZES | changes)
    mj.adapt(model, mj.MELoRAConfig(n=2, r=1, targets=["q_proj", "v_proj"]), rngs=nnx.Rngs(0))
    return stirred(model)


@pytest.fixture(scope="module")
def model() -> Any:
    return talkative()


@pytest.fixture(scope="module")
def lm(model) -> JaxLM:
    return JaxLM(model, BYTES, batch_size=4)


@nnx.jit
def _log_probabilities(model: Any, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(ids)[0])


def by_forward_pass(model: Any, context: list[int], end: list[int]) -> tuple[float, bool]:
    """All tokens at once: the definition."""
    ids = [*context, *end][-(model.max_length + 1) :]
    inputs = np.zeros((1, model.max_length), np.int32)
    inputs[0, : len(ids) - 1] = ids[:-1]
    table = np.asarray(_log_probabilities(model, inputs))[len(ids) - 1 - len(end) : len(ids) - 1]
    return float(table[np.arange(len(end)), end].sum()), bool((table.argmax(axis=1) == end).all())


def assert_scores(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-5, atol=1e-4)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def tokens_of(lm: JaxLM, context: str, end: str) -> tuple[list[int], list[int]]:
    if not context:
        return [lm.prefix_token_id], lm.tok_encode(end, add_special_tokens=False)
    return lm._encode_pair(context, end)


def test_scores_are_those_of_a_forward_pass_with_and_without_a_shared_beginning(lm, model):
    """Contexts of one beginning, one context with several ends, none, one that is too long, one end that is long."""
    pairs = FEW_SHOT + LONELY
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    assert_scores(found, [by_forward_pass(model, *tokens_of(lm, *pair)) for pair in pairs])
    assert lm.shortened == 1
    encoded = [Pair(*map(tuple, tokens_of(lm, *pair))) for pair in FEW_SHOT]
    assert {len(batch.shared) for batch in make_batches(encoded, 4)} == {96}


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_windows_hold_over_a_shared_beginning_and_padding(name):
    """Layers that look back five tokens, all of them or every other one."""
    model = lively(name, SIZES | {"num_hidden_layers": 2})
    found = JaxLM(model, BYTES, batch_size=4).loglikelihood(instances("loglikelihood", *FEW_SHOT))
    lm = JaxLM(model, BYTES)
    assert_scores(found, [by_forward_pass(model, *tokens_of(lm, *pair)) for pair in FEW_SHOT])


def test_an_end_without_a_token_of_its_own_is_an_error(lm):
    with pytest.raises(RunError, match="no token of its own"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b")))


def test_the_likeliest_end_is_told_from_others(lm, model):
    context, end = tokens_of(lm, "ab", "é ab")
    likeliest = []
    for _ in range(3):
        ids = np.zeros((1, model.max_length), np.int32)
        ids[0, : len(context) + len(likeliest)] = context + likeliest
        likeliest.append(int(np.asarray(_log_probabilities(model, ids))[len(context) + len(likeliest) - 1].argmax()))
    found = lm._loglikelihood_tokens([(None, context, likeliest), (None, context, end), (None, context, likeliest[:1])])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_an_adapter_scores_as_the_merged_model_also_where_layers_are_stacked():
    model = talkative(num_hidden_layers=2)
    merged = JaxLM(mj.merge(model), BYTES, batch_size=4)
    mj.stack_layers(model)
    pairs = instances("loglikelihood", *FEW_SHOT)
    assert_scores(JaxLM(model, BYTES, batch_size=4).loglikelihood(pairs), merged.loglikelihood(pairs))


def test_windows_of_a_long_text_count_each_token_once(lm, model):
    """193 tokens a window: the first after the first token, each later one after as many as there is room for."""
    text = "ab é: ba" * 90
    ids = lm.tok_encode(text)
    expected, limit = 0.0, model.max_length
    expected += by_forward_pass(model, [lm.prefix_token_id], ids[:limit])[0]
    for start in range(limit, len(ids), limit):
        end = ids[start : start + limit]
        before = ids[max(0, start + len(end) - limit - 1) : start]
        expected += by_forward_pass(model, before, end)[0]
    [found] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert len(ids) > 2 * limit
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def generated(lm: JaxLM, *texts: str, **settings: Any) -> list[str]:
    return lm.generate_until(instances("generate_until", *((text, settings) for text in texts)))


def test_answers_are_those_of_generate_cut_before_a_stop_string(lm, model):
    texts = ["ab", "b" * 40, "a: é"]
    for text, answer in zip(texts, generated(lm, *texts, until=[], max_gen_toks=9), strict=True):
        tokens = mj.generate(model, [lm.tok_encode(text)], max_new_tokens=9).tokens[0]
        assert answer == BYTES.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
    whole = generated(lm, "ab", until=[], max_gen_toks=9)[0]
    assert len(whole) > 4
    assert generated(lm, "ab", until=[whole[3:5], "never"], max_gen_toks=9) == [whole[:3]]


def test_drawn_answers_depend_on_the_seed_and_on_nothing_else(model):
    settings = {"until": [], "max_gen_toks": 7, "do_sample": True, "temperature": 0.9, "top_k": 40}
    one, again, other = (
        generated(JaxLM(model, BYTES, batch_size=4, seed=seed), *["ab"] * 5, **settings) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert len(set(one)) > 1


def test_prompts_lose_their_first_tokens_where_there_is_no_room(model):
    lm = JaxLM(model, BYTES, max_length=20)
    text = "b a" * 9
    short = JaxLM(model, BYTES).tok_encode(text)[-12:]
    tokens = mj.generate(model, [short], max_new_tokens=8).tokens[0]
    assert generated(lm, text, until=[], max_gen_toks=8) == [
        BYTES.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
    ]
    assert lm.shortened == 1
    with pytest.raises(ValueError, match="leave no room"):
        generated(lm, "a", until=[], max_gen_toks=20)
    with pytest.raises(RunError, match=r"a continuation has 2\d tokens, the model takes at most 20"):
        lm.loglikelihood(instances("loglikelihood", ("b", "ba" * 20)))


def test_logits_that_are_not_finite_end_the_evaluation(model):
    broken = talkative()
    broken.model.norm.scale.set_value(broken.model.norm.scale.get_value() * np.nan)
    lm = JaxLM(broken, BYTES)
    with pytest.raises(RunError, match="not finite"):
        lm.loglikelihood(instances("loglikelihood", ("b", "a")))
    with pytest.raises(RunError, match="NaN"):
        generated(lm, "a", until=[], max_gen_toks=3)


def test_a_tokenizer_of_another_model_is_found(lm):
    small = JaxLM(talkative(vocab_size=90), BYTES)
    with pytest.raises(RunError, match="outside the model's 90"):
        small.loglikelihood(instances("loglikelihood", ("b", " é")))


def test_generation_settings_are_taken_or_refused():
    manner = manner_of({"until": "Q", "max_new_tokens": 3, "temperature": 0.5, "do_sample": False}, 4)
    assert (manner.stop, manner.max_new_tokens, manner.temperature, manner.seed) == (("Q",), 3, 0.0, 4)
    assert manner_of({"until": [""], "do_sample": True, "temperature": 0.5, "top_p": 0.9}, 0).top_p == 0.9
    with pytest.raises(ValueError, match="'num_beams' is not known here"):
        manner_of({"num_beams": 4}, 0)


def test_special_tokens_are_added_once(model):
    lm = JaxLM(model, space_tokenizer(CHATML))
    assert lm.tok_encode("<s> a") == lm.tok_encode("a")[:1] + lm.tok_encode(" a", add_special_tokens=False)
    assert lm.prefix_token_id == lm.tok_encode("a")[0]
    turns = [{"role": "user", "content": "ab"}]
    assert lm.apply_chat_template(turns).endswith("<|im_start|>assistant\n")
    prefilled = [*turns, {"role": "assistant", "content": "b"}]
    assert lm.apply_chat_template(prefilled, add_generation_prompt=False).endswith("<|im_start|>assistant\nb")


_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
_HEADS = st.sampled_from([(), (1,) * 70, (1,) * 90, (1,) * 69 + (2,) * 40])


@given(st.lists(st.tuples(_HEADS, _TOKENS, _TOKENS), min_size=1, max_size=30), st.integers(1, 5))
def test_batches_hold_every_request_once_and_as_it_was(drawn, contexts):
    pairs = [Pair((*head, *rest), tuple(end)) for head, rest, end in drawn]
    seen = []
    for batch in make_batches(pairs, contexts):
        assert len(batch.ids) < 2 * contexts
        assert len(batch.requests) <= 4 * contexts
        assert batch.valid.any(axis=1).all()
        for row, place in enumerate(batch.requests):
            parent = batch.parents[row]
            context = (*batch.shared, *batch.ids[parent][batch.valid[parent]])
            assert Pair(context, tuple(batch.continuations[row, : batch.counts[row]])) == pairs[place]
        seen += batch.requests
    assert sorted(seen) == list(range(len(pairs)))


def test_sizes_are_few():
    assert [rounded_up(count) for count in (1, 16, 17, 100, 129, 2049)] == [16, 16, 32, 112, 160, 2560]
    assert common_length((1, 2, 3), (1, 2)) == 2
    assert common_length((1, 2, 3), (1, 4, 3)) == 1


def test_batches_of_one_size_are_compiled_once(model):
    """A hundred requests of many lengths are five programs, not a hundred."""
    rng = np.random.default_rng(3)
    pairs = [Pair(tuple(rng.integers(3, 99, rng.integers(1, 64))), tuple(rng.integers(3, 99, 1))) for _ in range(100)]
    scorer = Scorer(model)
    before = scorer._programs.score._cache_size()
    for batch in make_batches(pairs, 16):
        scorer(batch)
    assert scorer._programs.score._cache_size() - before <= 5


@pytest.mark.slow
def test_a_mesh_gives_the_scores_and_answers_of_one_device(tmp_path):
    """data x fsdp x tensor = 2 x 2 x 2, in a process of its own with eight devices."""
    path = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "mesh" / "eval_mesh_main.py"), str(tmp_path / "model")],
        env=environment(8, PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone, *meshes = json.loads(done.stdout)
    assert len(set(alone["answers"])) > 1
    for one in meshes:
        np.testing.assert_allclose(one["scores"], alone["scores"], rtol=1e-5)
        assert one["answers"] == alone["answers"]


@pytest.mark.parity
def test_scores_and_answers_are_those_of_lm_evals_own_torch_model(tmp_path):
    import warnings

    from tests.support.decoder_fixtures import CONFIGS, torch_decoder
    from tests.support.models_fixtures import tensors_of, write_checkpoint

    settings = SIZES | {"num_hidden_layers": 2, "eos_token_id": BYTES.eos_token_id}
    model = lively(changes=settings)
    write_checkpoint(tmp_path, CONFIGS["smollm2"] | {"max_position_embeddings": 193} | settings, tensors_of(model))
    reference, _ = torch_decoder(tmp_path)
    tokenizer = byte_tokenizer(CHATML, pad_token="</s>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=3, device="cpu")
        ours = JaxLM(mj.from_pretrained(tmp_path, task="causal-lm"), tokenizer, batch_size=3)
        pairs = instances("loglikelihood", *FEW_SHOT, *LONELY)
        assert_scores(ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True))
        texts = instances("loglikelihood_rolling", ("ab é: ba" * 60,), ("a",))
        expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
        np.testing.assert_allclose(ours.loglikelihood_rolling(texts), expected, rtol=1e-5)
        prompts = ["ab", "b: é", PREFIX]
        plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
        answers = theirs.generate_until(
            instances("generate_until", *((one, plain) for one in prompts)), disable_tqdm=True
        )
        found = generated(ours, *prompts, **plain)
        assert [one.rstrip("\ufffd") for one in answers] == found
        stop = {**plain, "until": [found[0][2:4], "never"]}
        answers = theirs.generate_until(
            instances("generate_until", *((one, stop) for one in prompts)), disable_tqdm=True
        )
        assert [one.rstrip("\ufffd") for one in answers] == generated(ours, *prompts, **stop)
