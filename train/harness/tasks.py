"""lm-eval's tasks by name, and ours; whatever can be checked is checked before their data is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.tasks import TaskManager

from train.data.files import READERS, find_rows, read_table

TASKS = Path(__file__).with_name("task_files")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Names of tasks and groups, and the tasks that they stand for.

    Attributes:
      names: as given.
      leaves: each task's settings from its YAML file, by its name.
      manager: lm-eval's index.
    """

    names: tuple[str, ...]
    leaves: Mapping[str, Mapping[str, Any]]
    manager: TaskManager

    @property
    def code_tasks(self) -> list[str]:
        """The tasks that run what the model writes."""
        return [name for name, settings in self.leaves.items() if settings.get("unsafe_code")]


def choose_tasks(names: Sequence[str], include: Path | None) -> Chosen:
    """Finds tasks; ours take precedence over lm-eval's of the same name, and those of `include` over both.

    Raises:
      ValueError: a name without a task, with the nearest names; a task that would run generated code outside our
        sandbox; `include` is not a folder.
    """
    if not names:
        raise ValueError("which tasks? e.g. --tasks mmlu,movie_reviews; lm-eval ls tasks lists lm-eval's own")
    if include is not None and not include.is_dir():
        raise ValueError(f"no folder at {include}; --include-path takes a folder of lm-eval's YAML files")
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    if include is not None or any(name not in manager.task_index for name in names):
        manager = _all_tasks(include)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        perhaps = f"perhaps {', '.join(near)}" if near else "lm-eval ls tasks lists lm-eval's own"
        raise ValueError(f"there is no task {unknown[0]!r}; {perhaps}")
    leaves = dict(leaf for name in names for leaf in _leaves(manager, name, {}))
    for name, settings in leaves.items():
        if settings.get("unsafe_code") and not (settings.get("metadata") or {}).get("sandboxed"):
            raise ValueError(
                f"{name} runs generated code in the process of the evaluation, which is not done here; choose"
                " humaneval, humaneval_instruct or instructeval_humaneval, which run it in a sandbox"
            )
    return Chosen(tuple(names), leaves, manager)


@functools.cache
def _all_tasks(include: Path | None) -> TaskManager:
    """The index with lm-eval's own tasks, which takes seconds to build."""
    return TaskManager(include_path=[TASKS, *([] if include is None else [include])])


def _leaves(manager: TaskManager, name: str, over: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks of a name: itself, or those of a tag or group, whose settings override theirs."""
    entry = manager.task_index.get(name)
    if entry is None:
        yield name, over
        return
    members: Any = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
    if isinstance(members, str):
        yield name, {**(entry.cfg or {}), **over}
        return
    for member in members or ():
        given = member if isinstance(member, dict) else {"task": member}
        child = given.get("task", given.get("group"))
        if isinstance(child, str):
            yield from _leaves(manager, child, {**over, **given})
        else:
            yield from ((str(one), over) for one in child or ())


def parse_data(words: Sequence[str], chosen: Chosen) -> dict[str, Path]:
    """`TASK=FOLDER` words as a folder by task.

    Raises:
      ValueError: a word is not of that form, names a task that is not evaluated, or a folder that does not exist.
    """
    folders = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not folder or name not in chosen.leaves:
            raise ValueError(f"--data {word} must be TASK=FOLDER with TASK one of {', '.join(chosen.leaves)}")
        if not Path(folder).is_dir():
            raise ValueError(f"no folder at {folder}; --data takes one with a file for each split, such as test.jsonl")
        folders[name] = Path(folder)
    return folders


def load_tasks(chosen: Chosen, data: Mapping[str, Path]) -> Any:
    """The tasks with their data, as `lm_eval.evaluator.evaluate` takes them.

    Args:
      data: local folders, by task, that replace the hub's data.

    Raises:
      ValueError: a data set can't be loaded.
    """
    # the seeds of lm-eval's own command, for tasks that draw
    random.seed(0)
    np.random.seed(1234)
    specs: list[Any] = [name for name in chosen.names if name not in data]
    for name, folder in data.items():
        rows = _rows_of(folder)
        specs.append({**_spec(chosen, name), "custom_dataset": lambda rows=rows, **_: rows})
    try:
        return chosen.manager.load(specs)
    except Exception as error:  # a task is lm-eval's or the user's code, which may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"the tasks can't be loaded ({reason}); data sets come from the Hugging Face hub, or by --data TASK=FOLDER"
        ) from error


def _spec(chosen: Chosen, name: str) -> dict[str, Any]:
    entry = chosen.manager.task_index[name]
    if entry.yaml_path is None:
        raise ValueError(f"--data {name}: lm-eval makes this task itself; name one that has a file")
    from lm_eval.tasks._yaml_loader import load_yaml

    return {**load_yaml(entry.yaml_path), "task": name}


def _rows_of(folder: Path) -> Any:
    """A folder's files as splits, each with the columns of its first row."""
    from datasets import Dataset, DatasetDict

    splits = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READERS:
            columns = list(next(find_rows(path).rows(), (0, {}))[1])
            splits[path.stem] = Dataset.from_dict(read_table(path, columns).columns)
    if not splits:
        raise ValueError(f"{folder} holds no data; give a folder with a file for each split, such as test.jsonl")
    return DatasetDict(splits)
