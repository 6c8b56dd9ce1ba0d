"""INSTRUCTEVAL's protocol on small local rows: prompts, shots, what is asked and what counts as right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from train.harness.sandbox.code import code_prompt, fenced_pass_at_1, first_function, pass_at_1, program_of
from train.harness.tasks import TASKS, choose_tasks, load_tasks


def write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(name: str, folder: Path, shots: int | None = None) -> Any:
    loaded = load_tasks(choose_tasks([name], None), {name: folder})
    [task] = loaded["tasks"].values()
    task.count_tokens = len
    if shots is not None:
        task.set_config("num_fewshot", shots)
    return task


def prompt_of(task: Any, doc: dict[str, Any]) -> str:
    return task.fewshot_context(doc, task.config.num_fewshot)


@pytest.fixture
def mmlu(tmp_path) -> Path:
    def row(subject: str, number: int) -> dict[str, Any]:
        choices = [f"c{number}{letter}" for letter in "wxyz"]
        return {"question": f"q{number}?", "subject": subject, "choices": choices, "answer": number % 4}

    subjects = ("us_history", "anatomy")
    write_rows(tmp_path / "mmlu", "test", [row(subject, 90) for subject in subjects])
    write_rows(tmp_path / "mmlu", "dev", [row(subject, number) for number in range(6) for subject in subjects])
    return tmp_path / "mmlu"


def test_mmlu_has_five_shots_of_the_subject(mmlu):
    task = load("instructeval_mmlu", mmlu)
    doc = task.eval_docs[1]
    shots = "".join(f"q{n}?\nA. c{n}w\nB. c{n}x\nC. c{n}y\nD. c{n}z\nAnswer: {'ABCD'[n % 4]}\n\n" for n in range(5))
    heading = "The following are multiple choice questions (with answers) about  anatomy.\n\n"
    question = "q90?\nA. c90w\nB. c90x\nC. c90y\nD. c90z\nAnswer:"
    assert prompt_of(task, doc) == heading + shots + question
    assert "about  us history.\n" in prompt_of(task, task.eval_docs[0])
    assert [task.process_results(doc, [answer])["acc"] for answer in (" C", "C.", "A", "", "The C")] == [1, 1, 0, 0, 0]
    settings = task.get_config("generation_kwargs")
    assert (settings["max_gen_toks"], settings["do_sample"], settings["until"]) == (2, False, [])


def test_shots_are_dropped_one_by_one_where_a_prompt_is_too_long(mmlu):
    task = load("instructeval_mmlu", mmlu)
    doc = task.eval_docs[0]
    heading, *shown, question = prompt_of(task, doc).split("\n\n")
    prompts = ["\n\n".join([heading, *shown[:count], question]) for count in range(6)]
    for count in range(6):
        task.prompt_limit = len(prompts[count])
        assert prompt_of(task, doc) == prompts[count]
        task.prompt_limit -= 1
        assert prompt_of(task, doc) == prompts[max(0, count - 1)]


def test_drop_asks_what_annotators_agree_on_and_not_of_the_shots_passages(tmp_path):
    rows = [
        {
            "passage": f" p{number // 2} ",
            "question": f"q{number}? ",
            "answers_spans": {
                "spans": ["no", "yes"] if number % 5 == 4 else [f"a{number} "] * 2,
                "types": ["span"] * 2,
            },
        }
        for number in range(30)
    ]
    write_rows(tmp_path / "drop", "validation", rows)
    task = load("instructeval_drop", tmp_path / "drop")
    usable = [row for row in rows if len(set(row["answers_spans"]["spans"])) == 1]
    random.seed(0)
    shots = random.sample(usable, k=3)
    taken = {shot["passage"] for shot in shots}
    asked = [row for row in usable if row["passage"] not in taken]
    assert task.eval_docs["question"] == [row["question"] for row in asked]
    text = "".join(
        f"{shot['passage'].strip()} {shot['question'].strip()}\nAnswer: {shot['answers_spans']['spans'][0].strip()}\n\n"
        for shot in shots
    )
    doc = task.eval_docs[0]
    assert prompt_of(task, doc) == f"{text}{doc['passage'].strip()} {doc['question'].strip()}\nAnswer:"
    label = doc["answers_spans"]["spans"][0].strip()
    assert [task.process_results(doc, [text])["acc"] for text in (f" {label} km", "no")] == [1, 0]
    assert task.get_config("generation_kwargs")["max_gen_toks"] == 8
    assert len(load("instructeval_drop", tmp_path / "drop", shots=1).eval_docs) > len(task.eval_docs)


def test_bbh_shows_its_first_rows_and_asks_the_others(tmp_path):
    rows = [{"input": f"i{number}", "target": f"t{number}"} for number in range(6)]
    write_rows(tmp_path / "bbh", "test", rows)
    task = load("instructeval_bbh_navigate", tmp_path / "bbh")
    assert task.eval_docs["input"] == ["i3", "i4", "i5"]
    shots = "i0\nAnswer: t0\n\ni1\nAnswer: t1\n\ni2\nAnswer: t2\n\n"
    assert prompt_of(task, task.eval_docs[1]) == f"{shots}i4\nAnswer:"
    assert task.process_results(task.eval_docs[1], ["t4!"]) == {"acc": 1.0}
    assert task.get_config("generation_kwargs")["max_gen_toks"] == 32


def test_bbh_is_the_mean_of_27_tasks():
    chosen = choose_tasks(["instructeval_bbh"], None)
    assert len(chosen.leaves) == 27
    assert all(
        settings["dataset_name"] == name.removeprefix("instructeval_bbh_") for name, settings in chosen.leaves.items()
    )
    group = chosen.manager.task_index["instructeval_bbh"].cfg
    assert group is not None
    assert group["aggregate_metric_list"] == [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]


def test_prompts_are_for_this_command_alone(mmlu):
    task = load("instructeval_mmlu", mmlu)
    doc = task.eval_docs[0]
    with pytest.raises(ValueError, match="no chat template"):
        task.fewshot_context(doc, 5, apply_chat_template=True)
    task.count_tokens = None
    with pytest.raises(ValueError, match="counts the tokens"):
        prompt_of(task, doc)


def test_code_is_kept_up_to_the_first_blank_line_with_even_indents():
    assert first_function("\n\n   x = 1\n\n    return x") == "    x = 1"
    assert first_function("    a\n     b\n c\n\nd") == "    a\n      b\n  c"
    assert code_prompt({"prompt": "def f():\n"}).endswith("such as testing or explanations\ndef f():\n")


def test_code_passes_where_its_tests_do():
    doc = {
        "prompt": "def twice(x):\n",
        "test": "def check(f):\n    assert f(2) == 4\n    assert f(0) == 0",
        "entry_point": "twice",
    }
    assert program_of(doc, "    return 2 * x").endswith(
        "    return 2 * x\ndef check(f):\n    assert f(2) == 4\n    assert f(0) == 0\ncheck(twice)"
    )
    answers = ("    return 2 * x", "    return x + 2", "    return x +", "    import os; os._exit(0)")
    assert [pass_at_1(doc, [answer])["pass@1"] for answer in answers] == [1.0, 0.0, 0.0, 0.0]
    assert fenced_pass_at_1(doc, ["    return 2 * x\n```\nIt doubles."]) == {"pass@1": 1.0}


def test_human_eval_is_drawn_at_a_low_temperature(human_eval_file):
    loaded = load_tasks(choose_tasks(["instructeval_humaneval", "humaneval"], None), {})
    task = loaded["tasks"]["instructeval_humaneval"]
    settings = task.get_config("generation_kwargs")
    assert (settings["temperature"], settings["max_gen_toks"], settings["do_sample"]) == (0.1, 512, True)
    assert len(task.eval_docs) == 164
    assert task.fewshot_context(task.eval_docs[0], 0) == code_prompt(task.eval_docs[0])
    assert loaded["tasks"]["humaneval"].fewshot_context(task.eval_docs[0], 0) == task.eval_docs[0]["prompt"]


def test_every_task_file_is_found():
    files = {path.stem for path in TASKS.rglob("*.yaml")}
    assert len(files) == 27 + 7
