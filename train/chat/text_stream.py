"""Tokens → text while they come: whole characters alone, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what decoding makes of a character of which bytes are missing


class TextStream:
    """The text of one answer, piece by piece.

    A stop string ends the text right before itself, wherever tokens begin and end; of several, the one that is complete
    first. What may still become one, or part of a character, is held back.

    Args:
      tokenizer: whose tokens come; its special tokens make no text.
      stops: the stop strings, none empty.

    Attributes:
      text: what was given out.
      stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        # Text depends on the tokens before (a space at the start, a character in bytes): new text is what the tokens
        # from `_start` on add to those up to `_known`, which decode to whole characters.
        self._start = self._known = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be given out now that `token` has come."""
        if self.stopped:
            return ""
        self._ids.append(token)
        known, text = self._decoded(self._known), self._decoded(len(self._ids))
        if len(text) <= len(known) or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._known = self._known, len(self._ids)
        return self._given(text[len(known) :], last=False)

    def finish(self) -> str:
        """What was held back, once no token follows; of a character that is not whole, nothing."""
        if self.stopped:
            return ""
        known, text = self._decoded(self._known), self._decoded(len(self._ids))
        self._start = self._known = len(self._ids)
        return self._given(text[len(known) :].rstrip(_INCOMPLETE), last=True)

    def _decoded(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

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
