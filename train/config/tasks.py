"""The tasks: which metrics they report, and of GLUE's also where their text is and which split is held out."""

from __future__ import annotations

import dataclasses

HUB_NAME = "nyu-mll/glue"
PREFIX = "glue/"


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One GLUE task: text columns, metrics (the first one ranks checkpoints), held-out split, kind and outputs."""

    text: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation_split: str = "validation"
    task: str = "classification"
    classes: int = 2


_PAIR = ("sentence1", "sentence2")

# Wang et al. 2019, "GLUE", table 1; column names as on the hub.
GLUE = {
    "cola": GlueTask(("sentence",), ("matthews", "accuracy")),
    "mnli": GlueTask(("premise", "hypothesis"), validation_split="validation_matched", classes=3),
    "mrpc": GlueTask(_PAIR, ("accuracy", "f1")),
    "qnli": GlueTask(("question", "sentence")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "rte": GlueTask(_PAIR),
    "sst2": GlueTask(("sentence",)),
    "stsb": GlueTask(_PAIR, ("pearson", "spearman", "mse"), task="regression", classes=1),
    "wnli": GlueTask(_PAIR),
}

_LOCAL = {
    "classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "causal-lm": ("perplexity",),
}


def glue_task(name: str | None) -> GlueTask | None:
    """The GLUE task that `name` ("glue/rte") stands for; `None` for any other data set.

    Raises:
      ValueError: "glue/" with a task that GLUE does not have.

    >>> glue_task("glue/rte").text
    ('sentence1', 'sentence2')
    """
    if name is None or not name.startswith(PREFIX):
        return None
    task = GLUE.get(name.removeprefix(PREFIX))
    if task is None:
        raise ValueError(f"data.name={name!r} is not a GLUE task; choose {', '.join(PREFIX + known for known in GLUE)}")
    return task


def metric_names(data_name: str | None, task: str) -> tuple[str, ...]:
    """The metrics an evaluation reports; the first ranks checkpoints unless the run says otherwise.

    >>> metric_names("glue/cola", "classification"), metric_names(None, "regression")
    (('matthews', 'accuracy'), ('pearson', 'spearman', 'mse'))
    """
    glue = glue_task(data_name)
    return glue.metrics if glue else _LOCAL[task]
