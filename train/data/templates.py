"""Conversations → text by a template, and the spans of that text that the model is to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from train.data.conversations import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stanford Alpaca's published prompt format, with and without an input.
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
_WITHOUT_INPUT = f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"

# Llama 3.2's template writes today's date unless it gets one, so a run that is resumed tomorrow would differ.
_DATE = "26 Jul 2024"
_PRIVATE_USE = range(0xE000, 0xF900)


class Span(NamedTuple):
    """Characters from `start` to before `end`."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation's text; `responses` are the spans that the model is to write, with the ends the template sets.

    `closed` says whether a special token ends the last of them; if not, the end of text has to be appended.
    """

    text: str
    responses: tuple[Span, ...]
    closed: bool


class Template(Protocol):
    """Makes the text of a conversation. `adds_special`: the tokenizer puts its own special tokens around the text."""

    adds_special: bool

    def render(self, conversation: Conversation) -> Rendered:
        """The text with its responses. Raises ValueError, with the row's place, if the template refuses it."""
        ...

    def prompt(self, conversation: Conversation) -> str:
        """The text up to the answer to the last turn, which is the user's: generation continues it."""
        ...


def make_template(tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    """The tokenizer's own template ("chat"), or Stanford Alpaca's ("alpaca").

    Raises:
      ValueError: there is no template of that name, or the name is "chat" and the tokenizer has none.
    """
    if name == "alpaca":
        return AlpacaTemplate()
    if name != "chat":
        raise ValueError(f"there is no template {name!r}; choose chat (the tokenizer's own) or alpaca")
    return ChatTemplate(tokenizer)


class AlpacaTemplate:
    r"""A preamble and the sections `### Instruction:`, `### Input:` if there is one, and `### Response:`.

    >>> AlpacaTemplate().prompt(Conversation((Turn("user", "Sing."),)))[-38:]
    '### Instruction:\nSing.\n\n### Response:\n'
    """

    adds_special = True

    def render(self, conversation: Conversation) -> Rendered:
        *asked, answer = conversation.turns
        prompt = self.prompt(dataclasses.replace(conversation, turns=tuple(asked)))
        text = prompt + answer.text
        return Rendered(text, (Span(len(prompt), len(text)),), closed=False)

    def prompt(self, conversation: Conversation) -> str:
        if [turn.role for turn in conversation.turns] != ["user"]:
            raise ValueError(
                f"{_at(conversation.place)}the alpaca template holds one question and its answer, no system turn and "
                "no second question; use the chat template"
            )
        instruction, context = conversation.turns[0].text, conversation.context
        return (_WITH_INPUT if context else _WITHOUT_INPUT).format(instruction=instruction, context=context)


class ChatTemplate:
    """The chat template that comes with a tokenizer. The context of a conversation follows its first question.

    A response begins where the prompt for its generation ends. In templates without such a prompt, or where the text
    before an answer depends on the answer, it begins at the answer's first letter. It ends with the first special token
    that the template writes after it, or else with everything that the template writes after it.

    Raises:
      ValueError: the tokenizer has no chat template.
    """

    adds_special = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; choose the alpaca template, or put "
                "chat_template.jinja of a model like it into its folder"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        asked = (Turn("user", "?"),)
        self._prompts = self._text(asked, "", prompt=True) != self._text(asked, "")

    def prompt(self, conversation: Conversation) -> str:
        return self._text(_with_context(conversation), conversation.place, prompt=True)

    def render(self, conversation: Conversation) -> Rendered:
        turns, place = _with_context(conversation), conversation.place
        text = self._text(turns, place)
        ends = self._marks(turns, text, place, after=True)
        starts = self._starts(turns, text, place)
        if starts is None or ends is None or any(start > end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(
                f"{_at(place)}the chat template rewrites a response, so that it can't be told from the rest of the "
                "text; use the alpaca template, or a chat template that writes responses as they are"
            )
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        return self._closed(text, [Span(*span) for span in zip(starts, ends, strict=True)], answers)

    def _closed(self, text: str, spans: Sequence[Span], answers: Sequence[str]) -> Rendered:
        """The spans, each extended by what the template writes after the answer."""
        ends = [_past_space(text, span.end, answer) for span, answer in zip(spans, answers, strict=True)]
        closing, closed = _through_first(text[ends[-1] :], self._special)
        ends = [end + len(closing) if text.startswith(closing, end) else end for end in ends]
        spans = [Span(span.start, end) for span, end in zip(spans, ends, strict=True)]
        return Rendered(text, tuple(spans), closed)

    def _starts(self, turns: Sequence[Turn], text: str, place: str) -> list[int] | None:
        """Where each answer begins: after its prompt if the text continues that, else at its own first letter."""
        if self._prompts:
            answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
            prompts = [self._text(turns[:number], place, prompt=True) for number in answers]
            if all(text.startswith(prompt) for prompt in prompts):
                return [len(prompt) for prompt in prompts]
        return self._marks(turns, text, place, after=False)

    def _marks(self, turns: Sequence[Turn], text: str, place: str, after: bool) -> list[int] | None:
        """Where each answer ends (or starts), found by a mark put there; None if that changes the text around it."""
        mark = next(char for char in map(chr, _PRIVATE_USE) if char not in text)
        marked = self._text([_marked(turn, mark, after) for turn in turns], place)
        pieces = marked.split(mark)
        if "".join(pieces) != text:
            return None
        places = list(_running_lengths(pieces[:-1]))
        return places if len(places) == sum(turn.role == "assistant" for turn in turns) else None

    def _text(self, turns: Sequence[Turn], place: str, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, date_string=_DATE
                )
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            remedy = "change the row, or use the alpaca template"
            raise ValueError(
                f"{_at(place)}the tokenizer's chat template refuses the turns: {reason}; {remedy}"
            ) from None


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _with_context(conversation: Conversation) -> tuple[Turn, ...]:
    if not conversation.context:
        return conversation.turns
    first, *others = conversation.turns
    return (first._replace(text=f"{first.text}\n\n{conversation.context}"), *others)


def _marked(turn: Turn, mark: str, after: bool) -> Turn:
    """Puts the mark inside the white space at the text's ends, which many templates strip."""
    if turn.role != "assistant":
        return turn
    core = turn.text.strip()
    return turn._replace(text=turn.text.replace(core, core + mark if after else mark + core, 1))


def _past_space(text: str, end: int, answer: str) -> int:
    space = answer[len(answer.rstrip()) :]
    return end + len(space) if text.startswith(space, end) else end


def _through_first(tail: str, special: set[str]) -> tuple[str, bool]:
    """`tail` to the end of its first special token, and True; all of it, and False, if it has none."""
    found = [(tail.index(token), token) for token in special if token and token in tail]
    if not found:
        return tail, False
    start, token = min(found, key=lambda one: (one[0], -len(one[1])))
    return tail[: start + len(token)], True


def _running_lengths(pieces: Sequence[str]) -> Iterator[int]:
    length = 0
    for piece in pieces:
        length += len(piece)
        yield length
