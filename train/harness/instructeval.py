"""INSTRUCTEVAL's protocol (Chia et al. 2023; the MELoRA paper's second benchmark) as lm-eval tasks.

Answers are generated from the likeliest tokens, and are right if they begin with the right one. While a prompt has more
tokens than the protocol allows, it loses one shot after another; a task counts tokens with `count_tokens`.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask

_LETTERS = "ABCD"


class InstructEvalTask(ConfigurableTask):
    """A task of the protocol; its subclasses define the text of a question and which rows are the shots.

    Attributes:
      prompt_limit: tokens of a prompt above which it loses shots.
      count_tokens: counts the tokens of a text; `python -m train eval` sets it.
    """

    prompt_limit = 2048

    def __init__(self, config: dict[str, Any]) -> None:
        self.count_tokens: Callable[[str], int] | None = None
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    @abc.abstractmethod
    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: object = None) -> str:
        """The question, up to where the answer begins."""

    @abc.abstractmethod
    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: object = None) -> str:
        """The right answer."""

    @abc.abstractmethod
    def shots(self, doc: Mapping[str, Any], count: int) -> Sequence[Mapping[str, Any]]:
        """At most `count` rows to show, with their answers, before a question."""

    def heading(self, doc: Mapping[str, Any]) -> str:
        """The text before all shots."""
        return ""

    def fewshot_docs(self) -> None:
        """No rows for lm-eval to draw from: the protocol determines the shots."""

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        *_: Any,
        **__: Any,
    ) -> str:
        """The prompt, with as many shots as fit.

        Raises:
          ValueError: `count_tokens` is not set, or a chat template or system instruction is given.
        """
        if self.count_tokens is None or apply_chat_template or system_instruction:
            raise ValueError(
                f"{self.config.task} is for python -m train eval, which counts the tokens of prompts, and has no chat"
                " template and no system instruction; leave those out"
            )
        shown = [f"{self.doc_to_text(shot)} {self.doc_to_target(shot)}\n\n" for shot in self.shots(doc, num_fewshot)]
        question = self.doc_to_text(doc)
        for count in range(len(shown), 0, -1):
            prompt = self.heading(doc) + "".join(shown[:count]) + question
            if self.count_tokens(prompt) <= self.prompt_limit:
                return prompt
        return self.heading(doc) + question

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """Whether the answer begins with the right one."""
        return {"acc": float(results[0].strip().startswith(self.doc_to_target(doc)))}


class Mmlu(InstructEvalTask):
    """Questions of 57 subjects with four answers each, after five of the same subject; the mean over all questions."""

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: object = None) -> str:
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, doc["choices"], strict=True)]
        return "\n".join([doc["question"], *lines, "Answer:"])

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: object = None) -> str:
        return _LETTERS[doc["answer"]]

    def heading(self, doc: Mapping[str, Any]) -> str:
        # two spaces, as in the original of Hendrycks et al.
        subject = doc["subject"].replace("_", " ")
        return f"The following are multiple choice questions (with answers) about  {subject}.\n\n"

    def shots(self, doc: Mapping[str, Any], count: int) -> Sequence[Mapping[str, Any]]:
        return self._by_subject().get(doc["subject"], [])[:count]

    def _by_subject(self) -> dict[str, list[dict[str, Any]]]:
        if not hasattr(self, "_shots"):
            self._shots: dict[str, list[dict[str, Any]]] = {}
            for row in self.dataset["dev"]:
                self._shots.setdefault(row["subject"], []).append(row)
        return self._shots


class Drop(InstructEvalTask):
    """Questions on a passage to which all annotators gave one answer, after three drawn from the same rows."""

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: object = None) -> str:
        return f"{doc['passage'].strip()} {doc['question'].strip()}\nAnswer:"

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: object = None) -> str:
        return doc["answers_spans"]["spans"][0].strip()

    def shots(self, doc: Mapping[str, Any], count: int) -> Sequence[Mapping[str, Any]]:
        return self._parted(count)[0]

    def validation_docs(self) -> Any:
        """The rows whose passages are not those of the shots."""
        return self._parted(self.config.num_fewshot or 0)[1]

    def _parted(self, count: int) -> tuple[list[dict[str, Any]], Any]:
        """The shots and the questions, which depend on the number of shots."""
        if getattr(self, "_parts_of", None) != count:
            rows = self.dataset[self.config.validation_split]
            answers = [{span.strip() for span in one["spans"]} for one in rows["answers_spans"]]
            usable = [place for place, spans in enumerate(answers) if len(spans) == 1]
            drawn = random.Random(0).sample(usable, count)
            passages = rows["passage"]
            shown = {passages[place] for place in drawn}
            asked = rows.select([place for place in usable if passages[place] not in shown])
            self._parts_of, self._parts = count, ([rows[place] for place in drawn], asked)
        return self._parts


class Bbh(InstructEvalTask):
    """One of BIG-Bench Hard's tasks: its first rows are the shots, and all others are asked."""

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: object = None) -> str:
        return f"{doc['input']}\nAnswer:"

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: object = None) -> str:
        return doc["target"]

    def shots(self, doc: Mapping[str, Any], count: int) -> Sequence[Mapping[str, Any]]:
        rows = self.dataset[self.config.test_split]
        return [rows[place] for place in range(min(count, len(rows)))]

    def test_docs(self) -> Any:
        """The rows that are not shots."""
        rows = self.dataset[self.config.test_split]
        return rows.select(range(self.config.num_fewshot or 0, len(rows)))
