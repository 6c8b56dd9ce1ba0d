"""Tokens → text as they come: only whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what decoding makes of a character that lacks bytes


class TextStream:
    """The text of one answer, piece by piece.

    A stop string ends the text right before itself, wherever tokens begin and end; of several, the one that is complete
    first counts. Text that may still become a stop string, or part of a character, is held back.

    Args:
      tokenizer: a fast tokenizer, whose tokens come; its special tokens make no text.
      stops: the stop strings, none empty.

    Attributes:
      text: what was given out.
      stopped: whether a stop string ended it.

    Raises:
      ValueError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} can't make text of tokens as they come; save a fast one "
                "(tokenizer.json) into the folder"
            )
        self.text = ""
        self.stopped = False
        backend: Any = tokenizer.backend_tokenizer
        self._tokenizer: Tokenizer = backend
        self._stops = stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0  # characters that the stream has decoded
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be given out after `token`."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._decoded += len(piece)
        return self._given(piece, last=False)

    def finish(self) -> str:
        """The text that was held back, once no token follows, without a last character that lacks bytes."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._decoded :].rstrip(_INCOMPLETE)
        self._decoded += len(rest)
        return self._given(rest, last=True)

    def _given(self, new: str, last: bool) -> str:
        held = self._held + new
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in self._stops if stop in held]
        if found:
            self.stopped = True
            end = min(found)[1]
        else:
            end = len(held) if last else len(held) - self._possible(held)
        given, self._held = held[:end], held[end:]
        self.text += given
        return given

    def _possible(self, held: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        parts = [stop[:length] for stop in self._stops for length in range(1, len(stop))]
        return max((len(part) for part in parts if held.endswith(part)), default=0)
