"""`python -m train eval`: the scores it prints and writes, and what it refuses before work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import melora_jax as mj
from tests.support.chat import byte_tokenizer
from tests.support.talkers import BYTES, talker
from tests.support.tiny import stirred
from train.__main__ import main
from train.report.terminal import RequestProgress

SENTENCES = ["ab", "b a", "aab b", "b", "a", "bb ab"]
YAML = """
task: own_task
custom_dataset: !function rows.rows
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["zz"]
  max_gen_toks: 5
"""
METRIC = """metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer of bytes and a ChatML template."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    mj.save_pretrained(talker(), folder)
    BYTES.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    model = mj.from_pretrained(folder, task="causal-lm")
    mj.adapt(model, mj.MELoRAConfig(n=2, r=1, targets=["q_proj", "v_proj", "down_proj"]), rngs=nnx.Rngs(0))
    mj.save_adapter(stirred(model), folder.parent / "adapter")
    return folder.parent / "adapter"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    for split, sentences in (("train", SENTENCES[:1]), ("validation", SENTENCES)):
        rows = ({"sentence": one, "label": number % 2} for number, one in enumerate(sentences))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(capsys, *words: object) -> str:
    assert main(["eval", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    assert main(["eval", *map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip().split("\n")[-1]


@nnx.jit
def _log_probabilities(model: Any, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(ids)[0])


def likelihood(model: Any, context: list[int], ids: list[int]) -> float:
    """Of the tokens after the context, by a whole forward pass."""
    assert ids[: len(context)] == context
    table = np.asarray(_log_probabilities(model, np.pad(ids, (0, 97 - len(ids)))[None]))
    return float(sum(table[place - 1, ids[place]] for place in range(len(context), len(ids))))


def accuracy(model: Any, shot: str) -> float:
    """How often the right word is the likelier one."""
    right = []
    for number, sentence in enumerate(SENTENCES):
        prompt = f"{shot}Review: {sentence}\nSentiment:"
        ends = [BYTES(f"{prompt} {word}")["input_ids"] for word in ("negative", "positive")]
        scores = [likelihood(model, BYTES(prompt)["input_ids"], end) for end in ends]
        right.append(int(np.argmax(scores)) == number % 2)
    return float(np.mean(right))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_scores_are_printed_and_written(folder, adapter, reviews, tmp_path, capsys, with_adapter):
    model = mj.from_pretrained(folder, task="causal-lm")
    added = ()
    if with_adapter:
        mj.load_adapter(model, adapter)
        added = ("--adapter", adapter)
    shot = f"Review: {SENTENCES[0]}\nSentiment: negative\n\n"
    expected = accuracy(model, shot)
    words = ("--tasks", "movie_reviews", "--data", f"movie_reviews={reviews}", "--num-fewshot", 1, "--samples")
    printed = evaluated(capsys, folder, *words, "--output", tmp_path, *added)
    assert f"{expected:.4f}" in printed
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["scores"]["movie_reviews"]["acc"]["value"] == expected
    error = np.std([1.0] * round(6 * expected) + [0.0] * round(6 * (1 - expected)), ddof=1) / 6**0.5
    np.testing.assert_allclose(found["scores"]["movie_reviews"]["acc"]["stderr"], error)
    assert found["rows"]["movie_reviews"] == {"original": 6, "effective": 6}
    assert (found["shots"], found["requests_shortened"]) == ({"movie_reviews": 1}, 0)
    assert found["versions"]["jax"] == jax.__version__
    assert found["settings"]["num_fewshot"] == 1
    if with_adapter:
        assert found["adapter"]["config"]["n"] == 2
        assert found["adapter"]["parameters"] == mj.describe(model).adapter
    else:
        assert found["adapter"] is None
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["doc"]["sentence"] for sample in samples] == SENTENCES
    assert samples[2]["arguments"][0][0] == f"{shot}Review: {SENTENCES[2]}\nSentiment:"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "samples.jsonl"]


def test_prompts_go_through_the_chat_template(folder, reviews, tmp_path, capsys):
    words = ("--tasks", "movie_reviews", "--data", f"movie_reviews={reviews}", "--num-fewshot", 1, "--limit", 1)
    words += ("--samples", "--output", tmp_path, "--max-length", 50)
    words += ("--apply-chat-template", "--system-instruction", "Be kind.")
    question = f"Review: {SENTENCES[0]}\nSentiment:"
    system, answer = "<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>assistant\n"
    shot, asked = f"<|im_start|>user\n{question}", f"{question}<|im_end|>\n"
    turns = f"{shot}<|im_end|>\n{answer}negative<|im_end|>\n<|im_start|>user\n{asked}"
    for added, middle in [((), f"{shot} negative\n\n{asked}"), (("--fewshot-as-multiturn",), turns)]:
        assert "lost their first tokens" in evaluated(capsys, folder, *words, *added)
        [sample] = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert [one[0] for one in sample["arguments"]] == [system + middle + answer] * 2


@pytest.fixture(scope="module")
def own(folder, tmp_path_factory) -> Path:
    """Tasks of a user's own: one of which a model's answers but one are right, and two that are refused."""
    own = tmp_path_factory.mktemp("own")
    model = mj.from_pretrained(folder, task="causal-lm")
    said = []
    for text in SENTENCES:
        tokens = mj.generate(model, [BYTES(text)["input_ids"]], max_new_tokens=5).tokens[0]
        said.append(BYTES.decode(tokens, skip_special_tokens=True))
    said[1] = "no"
    rows = [{"text": text, "answer": answer} for text, answer in zip(SENTENCES, said, strict=True)]
    (own / "rows.py").write_text(
        f"import datasets\ndef rows(**_):\n    return {{'test': datasets.Dataset.from_list({rows})}}\n"
    )
    for name, line in {"own": "", "beams": "  num_beams: 3\n", "code": "unsafe_code: true\n"}.items():
        (own / f"{name}.yaml").write_text(YAML.replace("own_task", f"{name}_task") + line + METRIC)
    return own


@pytest.mark.slow
def test_own_tasks_are_included_and_a_limit_is_kept(folder, own, tmp_path, capsys):
    words = (folder, "--include-path", own, "--tasks")
    evaluated(capsys, *words, "own_task", "--output", tmp_path, "--limit", 4, "--batch-size", 2)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["scores"] == {"own_task": {"exact_match": {"value": 0.75, "stderr": 0.25}}}
    assert found["rows"]["own_task"] == {"original": 6, "effective": 4}
    assert "task beams_task: generation setting 'num_beams'" in refused(capsys, *words, "beams_task")
    assert "code_task runs generated code in the process of the evaluation" in refused(capsys, *words, "code_task")
    assert "there is no task 'mmlu_anatomi'; perhaps mmlu_anatomy," in refused(capsys, *words, "mmlu_anatomi")
    assert "mbpp runs generated code" in refused(capsys, *words, "mbpp", "--run-generated-code")
    assert "the tasks can't be loaded" in refused(capsys, *words, "mmlu_anatomy")


def test_lm_evals_own_tasks_of_each_kind_of_score_run(folder, own, tmp_path, capsys):
    rows = {
        "mmlu_anatomy": {"test": [{"question": one, "choices": list("abcd"), "answer": 2} for one in SENTENCES]},
        "lambada_openai": {"test": [{"text": f"{one} b"} for one in SENTENCES]},
        "wikitext": {part: [{"page": f"{one} : a b"} for one in SENTENCES] for part in ("train", "validation", "test")},
    }
    rows["mmlu_anatomy"]["dev"] = rows["mmlu_anatomy"]["test"]
    data: list[Any] = []
    for task, splits in rows.items():
        (tmp_path / task).mkdir()
        for split, some in splits.items():
            (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        data.append(f"{task}={tmp_path / task}")
    words = ("--include-path", own, "--tasks", ",".join(rows), "--data", *data, "--output", tmp_path / "out")
    evaluated(capsys, folder, *words)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    model = mj.from_pretrained(folder, task="causal-lm")
    after = [likelihood(model, BYTES(one)["input_ids"], BYTES(f"{one} b")["input_ids"]) for one in SENTENCES]
    np.testing.assert_allclose(found["lambada_openai"]["perplexity"]["value"], np.exp(-np.mean(after)), rtol=1e-5)
    first = [BYTES.bos_token_id]
    whole = [likelihood(model, first, first + BYTES(f"{one}: a b")["input_ids"]) for one in SENTENCES]
    words_there = sum(len(f"{one} : a b".split()) for one in SENTENCES)
    np.testing.assert_allclose(
        found["wikitext"]["word_perplexity"]["value"], np.exp(-sum(whole) / words_there), rtol=1e-5
    )
    choices = []
    for one in SENTENCES:
        prompt = f"{one}\nA. a\nB. b\nC. c\nD. d\nAnswer:"
        ends = [BYTES(f"{prompt} {letter}")["input_ids"] for letter in "ABCD"]
        choices.append(np.argmax([likelihood(model, BYTES(prompt)["input_ids"], end) for end in ends]) == 2)
    assert found["mmlu_anatomy"]["acc"]["value"] == np.mean(choices)


def test_generated_code_is_run_on_request_alone(folder, capsys, tmp_path, human_eval_file):
    one = tmp_path / "humaneval"
    one.mkdir()
    first = human_eval_file.read_text().split("\n")[0]
    short = json.dumps(json.loads(first) | {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"})
    (one / "test.jsonl").write_text(short + "\n")
    words = (folder, "--tasks", "instructeval_humaneval", "--data", f"instructeval_humaneval={one}")
    assert "allow it with --run-generated-code" in refused(capsys, *words)
    assert "512 new tokens leave no room" in refused(capsys, *words, "--run-generated-code")


def test_what_is_refused(folder, adapter, reviews, capsys, tmp_path, minilm_folder):
    words = ("--tasks", "movie_reviews", "--data", f"movie_reviews={reviews}")
    for option, value, message in [
        ("--tasks", ",", "which tasks?"),
        ("--batch-size", 0, "must be at least 1"),
        ("--limit", 0, "a whole number of rows"),
        ("--limit", 2.5, "a whole number of rows"),
        ("--num-fewshot", -1, "at least 0"),
        ("--max-length", 1, "at least 2"),
        ("--include-path", tmp_path / "none", "no folder at"),
        ("--data", "mmlu=x", "must be TASK=FOLDER with TASK one of movie_reviews"),
        ("--data", "movie_reviews=none", "no folder at none"),
        ("--data", f"movie_reviews={tmp_path}", "holds no data"),
        ("--adapter", tmp_path / "none", "no adapter at"),
        ("--mesh", "data=2,rows=3", "not of the form"),
        ("--mesh", "data=97", "needs 97 devices"),
    ]:
        assert message in refused(capsys, folder, *words, option, value), option
    assert "give one with --output" in refused(capsys, folder, *words, "--samples")
    assert "add --apply-chat-template" in refused(capsys, folder, *words, "--fewshot-as-multiturn")
    assert "has a protocol" in refused(
        capsys,
        folder,
        "--tasks",
        "instructeval_bbh_snarks",
        "--data",
        f"instructeval_bbh_snarks={bbh(tmp_path)}",
        "--apply-chat-template",
    )
    # another model's adapter, an encoder
    wide = tmp_path / "wide"
    other = talker_of_another_width()
    mj.adapt(other, mj.MELoRAConfig(n=1, r=1, targets=["q_proj"]), rngs=nnx.Rngs(0))
    mj.save_adapter(other, wide)
    assert "is for another model" in refused(capsys, folder, *words, "--adapter", wide)
    assert "causal-lm" in refused(capsys, minilm_folder, *words)
    plain = tmp_path / "plain"
    mj.save_pretrained(talker(), plain)
    byte_tokenizer(None).save_pretrained(plain)
    assert "has no chat template" in refused(capsys, plain, *words, "--apply-chat-template")


def bbh(folder: Path) -> Path:
    (folder / "bbh").mkdir()
    rows = [json.dumps({"input": f"i{number}", "target": "t"}) + "\n" for number in range(5)]
    (folder / "bbh" / "test.jsonl").write_text("".join(rows))
    return folder / "bbh"


def talker_of_another_width() -> Any:
    from tests.support.decoder_fixtures import random_decoder

    return random_decoder("smollm2", {"hidden_size": 48, "num_hidden_layers": 1})


def test_without_lm_eval_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "melora_jax[eval]" in refused(capsys, folder, "--tasks", "movie_reviews")


def test_progress_says_how_long_it_will_take(tmp_path):
    with (tmp_path / "log").open("w") as file:
        times = iter([0.0, 4.0, 12.0, 20.0])
        with RequestProgress("answers", 10, console=Console(file=file), clock=lambda: next(times)) as progress:
            for count in (2, 4, 4):
                progress.advance(count)
    assert (tmp_path / "log").read_text() == "answers 6/10  12 s  ETA 8 s\nanswers 10/10  20 s  ETA 0 s\n"
