"""A model with its tokenizer and template: conversations in, text out as it is generated."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import nnx

from melora_jax.generation import NewTokens, stream
from train.chat.text_stream import TextStream
from train.config.recipe import read_recipe
from train.data.conversations import Conversation
from train.data.templates import ChatTemplate, Template, make_template
from train.data.tokens import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ended = Literal["end", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """How answers are generated: the settings of `melora_jax.generate`, and strings that end an answer."""

    max_new_tokens: int = 256
    """The longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above 0, tokens are drawn."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the smallest set of likeliest tokens with this probability, after top-k."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; it is cut right before them."""


@dataclasses.dataclass
class Speed:
    """Tokens generated and the time they took. The first ones wait for the prompt and for compiling."""

    tokens: int = 0
    later_tokens: int = 0
    first_seconds: float = 0.0
    later_seconds: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.later_tokens / self.later_seconds:.1f} tokens/s" if self.later_tokens else ""
        return f"{self.tokens:,} tokens{rate}, the first after {self.first_seconds:.1f} s"

    def __add__(self, other: Speed) -> Speed:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Speed(*(one + two for one, two in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Attributes:
      model: a causal language model, plain or adapted.
      tokenizer: its tokenizer.
      template: makes the text of a conversation; with None the model gets the text of the last turn as it is.
      manner: how answers are generated.
    """

    model: nnx.Module
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    manner: Manner

    @property
    def remembers(self) -> bool:
        """Whether a question may follow an answer, which needs a template for several turns."""
        return isinstance(self.template, ChatTemplate)

    def prompt_ids(self, conversation: Conversation) -> np.ndarray:
        """The tokens from which the answer is generated, int32 [tokens].

        Raises:
          ValueError: the template refuses the conversation.
        """
        if self.template is not None:
            return encode_prompt(self.tokenizer, self.template, conversation)
        return np.asarray(self.tokenizer(conversation.turns[-1].text, verbose=False)["input_ids"], np.int32)

    def answer(self, prompts: Sequence[np.ndarray], number: int = 0, *, shrink: bool = False) -> Answers:
        """Starts to answer a batch of prompts.

        Args:
          prompts: token ids, of any lengths.
          number: of the batch or of the turn; each number draws different tokens.
          shrink: whether answers that have ended leave the batch, once they are three quarters of it. Each size of
            batch compiles a program, which pays off for long answers to many prompts. Not on a mesh.

        Raises:
          ValueError: as in `melora_jax.generate`.
        """
        return Answers(self, prompts, jax.random.fold_in(jax.random.key(self.manner.seed), number), shrink)


class Answers:
    """The answers to a batch of prompts. Iterate once: each step gives the new text of each row, which may be empty.

    Attributes:
      texts: the text of each row so far.
      ended: why each row ended: an end token of the model or its tokenizer, a stop string, or the length; None before
        it has ended.
      speed: tokens and seconds so far.
    """

    def __init__(self, speaker: Speaker, prompts: Sequence[np.ndarray], key: jax.Array, shrink: bool) -> None:
        manner = speaker.manner
        tokenizer: Any = speaker.tokenizer
        mask = np.arange(max(map(len, prompts))) < np.array([[len(prompt)] for prompt in prompts])
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = np.concatenate(prompts)
        self._steps = stream(
            speaker.model,
            ids,
            mask,
            max_new_tokens=manner.max_new_tokens,
            temperature=manner.temperature,
            top_k=manner.top_k,
            top_p=manner.top_p,
            key=key,
        )
        special = tokenizer.get_added_vocab()
        # A chat model's tokenizer may name the end of a turn where the model's configuration names another token.
        self._ends = {tokenizer.eos_token_id, *(special[stop] for stop in manner.stop if stop in special)}
        self._rows = [TextStream(tokenizer, manner.stop) for _ in prompts]
        self.ended: list[Ended | None] = [None] * len(prompts)
        self.speed = Speed()
        self._shrink = shrink

    @property
    def texts(self) -> list[str]:
        """The text of each row so far."""
        return [row.text for row in self._rows]

    def __iter__(self) -> Iterator[list[str]]:
        began = time.perf_counter()
        for rows, new in self._tokens():
            self._count(time.perf_counter() - began)
            pieces = [""] * len(self._rows)
            for row, token, stopped in zip(rows, new.tokens, new.stopped, strict=False):
                pieces[row] = self._piece(row, int(token), bool(stopped))
            yield pieces
            if all(self.ended):
                return
        yield [self._last_piece(row, "length") for row in range(len(self._rows))]

    def _tokens(self) -> Iterator[tuple[list[int], NewTokens]]:
        """New tokens, and the rows of the answers that the first of them belong to; the others only fill the batch."""
        rows, size, kept = list(range(len(self._rows))), len(self._rows), None
        while True:
            try:
                new = self._steps.send(kept)
            except StopIteration:
                return
            yield rows, new
            going = [place for place, row in enumerate(rows) if not self.ended[row]]
            kept = None
            if self._shrink and going and 4 * len(going) <= size:
                while 4 * len(going) <= size:
                    size //= 4
                rows, kept = [rows[place] for place in going], going + going[:1] * (size - len(going))

    def _count(self, seconds: float) -> None:
        going, speed = self.ended.count(None), self.speed
        if speed.tokens:
            speed.later_tokens += going
            speed.later_seconds = seconds - speed.first_seconds
        else:
            speed.first_seconds = seconds
        speed.tokens += going

    def _piece(self, row: int, token: int, stopped: bool) -> str:
        if self.ended[row]:
            return ""
        if stopped or token in self._ends:
            return self._last_piece(row, "end")
        piece = self._rows[row].push(token)
        if self._rows[row].stopped:
            self.ended[row] = "stop"
        return piece

    def _last_piece(self, row: int, ended: Ended) -> str:
        if self.ended[row]:
            return ""
        piece = self._rows[row].finish()
        self.ended[row] = "stop" if self._rows[row].stopped else ended
        return piece


def find_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Template | None:
    """The template of a name: "chat", "alpaca" or "none". None takes the tokenizer's own, if it has one.

    Raises:
      ValueError: the tokenizer's own is asked for, and it has none.
    """
    if name is None:
        name = "chat" if tokenizer.chat_template else "none"
    return None if name == "none" else make_template(tokenizer, name)


def adapter_folder(path: str) -> Path:
    """The folder of the adapter: within a run's folder, or `path` itself."""
    return Path(path) / "adapter" if _is_run(path) else Path(path)


def template_of_run(path: str) -> str | None:
    """The template of a run's conversations; None if `path` is not the folder of a run.

    Raises:
      ValueError: its config.toml is damaged.
    """
    return read_recipe(Path(path) / "config.toml").instruction.template if _is_run(path) else None


def _is_run(path: str) -> bool:
    return (Path(path) / "config.toml").is_file() and (Path(path) / "adapter").is_dir()
