"""Rows of instruction data → conversations: recognised by their columns, checked row by row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from train.hosts.shares import ALONE, Share

Role = Literal["system", "user", "assistant"]
Record = Mapping[str, Any]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# The keys of a turn's speaker and text: ShareGPT's and OpenAI's.
_TURN_KEYS = (("from", "value"), ("role", "content"))
_TURN_COLUMNS = ("conversations", "messages")


class Turn(NamedTuple):
    """What one side said."""

    role: Role
    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """At most one system turn, then user and assistant in turn, the assistant last.

    `context` is what Alpaca rows call input, else empty; `place` names the row in errors.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout of rows: the columns it needs, the others it knows, and a function of a row to its conversation."""

    needs: tuple[str, ...]
    read: Callable[[Record], Conversation]
    knows: tuple[str, ...] = ()


def find_format(columns: Sequence[str], source: str) -> str:
    """The name of the one format whose columns are all present.

    Raises:
      ValueError: none, or several.

    >>> find_format(["id", "messages"], "chat.jsonl")
    'messages'
    """
    fitting = [name for name, form in FORMATS.items() if set(form.needs) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    there = f"{source} has the columns {', '.join(columns)}"
    if fitting:
        raise ValueError(f"{there}, which fit the formats {' and '.join(fitting)}; choose one by its name")
    layouts = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
    raise ValueError(f"{there}, which fit no format of instruction data ({layouts}); rename the columns")


def read_conversations(
    rows: Iterable[tuple[str, Record]], name: str, share: Share = ALONE
) -> tuple[list[Conversation], list[str]]:
    """The conversation of each row, all rows checked.

    A last turn without an answer is left out, and columns that the format does not know are not read; notes say so.

    Args:
      rows: (place, record) of each row that this process holds.
      name: of the format, a key of `FORMATS`.
      share: exchanges errors and counts with the other processes.

    Returns:
      The conversations, and notes for the user on the rows of all processes.

    Raises:
      ValueError: rows that can't be used. The message names the place of the first and counts the others.
    """
    conversations, own = share.together(lambda: _read(rows, FORMATS[name]))
    counts = sum(map(Counter, share.gather(lambda: own)), Counter())
    return conversations, [f"{count:,} {what}" for what, count in sorted(counts.items())]


def _read(rows: Iterable[tuple[str, Record]], form: Format) -> tuple[list[Conversation], Counter[str]]:
    """The conversations, and how many rows each note is about."""
    conversations: list[Conversation] = []
    problems: list[str] = []
    counts: Counter[str] = Counter()
    for place, record in rows:
        try:
            conversation = dataclasses.replace(form.read(record), place=place)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        counts.update(f"rows have {what}, which is not read" for what in _unread(record, form))
        if conversation.turns[-1].role == "user":
            counts["rows end with a turn that has no answer, which is left out"] += 1
            conversation = dataclasses.replace(conversation, turns=conversation.turns[:-1])
        conversations.append(conversation)
    if problems:
        more = f" ({len(problems) - 1:,} more rows can't be used)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return conversations, counts


def _unread(record: Record, form: Format) -> set[str]:
    """The columns, and the keys of turns, that are filled but unknown to the format."""
    unread = {f"a column {key!r}" for key in _filled(record) - {*form.needs, *form.knows}}
    if form.needs[0] in _TURN_COLUMNS:
        known = {key for keys in _TURN_KEYS for key in keys}
        unread |= {f"a turn with {key!r}" for entry in record[form.needs[0]] for key in _filled(entry) - known}
    return unread


def _filled(record: Record) -> set[str]:
    return {key for key, value in record.items() if value is not None}


def _alpaca(record: Record) -> Conversation:
    instruction, context = _text(record, "instruction"), record.get("input")
    if context is not None and not isinstance(context, str):
        raise ValueError(f"input={context!r} is not text; give a string, or leave it out")
    response = _text(record, "output", "response")
    return Conversation((Turn("user", instruction), Turn("assistant", response)), context or "")


def _completion(record: Record) -> Conversation:
    return Conversation(
        (Turn("user", _text(record, "prompt")), Turn("assistant", _text(record, "completion", "response")))
    )


def _turns_of(column: str) -> Callable[[Record], Conversation]:
    def read(record: Record) -> Conversation:
        entries = record.get(column)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{column} is not a list of turns; write [{{...}}, {{...}}]")
        turns = tuple(_turn(entry, f"{column}[{number}]") for number, entry in enumerate(entries))
        _check_order(turns, column)
        return Conversation(turns)

    return read


FORMATS = {
    "alpaca": Format(("instruction", "output"), _alpaca, knows=("input",)),
    "sharegpt": Format(("conversations",), _turns_of("conversations")),
    "messages": Format(("messages",), _turns_of("messages")),
    "completion": Format(("prompt", "completion"), _completion),
}


def _text(record: Record, column: str, kind: str = "text") -> str:
    if column not in record:
        raise ValueError(f"no column {column!r}; columns there: {', '.join(record)}")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"{column}={value!r} is not text; give every row a string")
    if not value.strip():
        raise ValueError(f"{column} is an empty {kind}; fill it in, or remove the row")
    return value


def _turn(entry: Any, place: str) -> Turn:
    filled = _filled(entry) if isinstance(entry, dict) else set()
    keys = next((keys for keys in _TURN_KEYS if filled.issuperset(keys)), None)
    if keys is None:
        raise ValueError(f"{place} has neither from and value nor role and content; write each turn with both")
    who, text = (entry[key] for key in keys)
    if not isinstance(who, str) or who not in _ROLES:
        raise ValueError(f"{place} has the unknown role {who!r}; known: {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"{place} {keys[1]}={text!r} is not text; give a string")
    if not text.strip() and _ROLES[who] != "system":
        kind = "response" if _ROLES[who] == "assistant" else "turn"
        raise ValueError(f"{place} is an empty {kind}; fill it in, or remove the row")
    return Turn(_ROLES[who], text)


def _check_order(turns: Sequence[Turn], column: str) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ValueError(f"{column} has no assistant turn, so there is nothing to learn; remove the row")
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:], start=first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if role != expected:
            order = "after at most one system turn, user and assistant take turns, the user first"
            raise ValueError(f"{column}[{number}] is of {role} where {expected} should speak: {order}")
