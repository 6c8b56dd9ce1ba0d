"""Rows of the four formats become the same conversation; a row that can't be used is named before any work."""

from __future__ import annotations

import pytest

from train.data.conversations import FORMATS, Conversation, Turn, find_format, read_conversations

TALK = (Turn("user", "Add 1, 2."), Turn("assistant", "3"))
MORE = (*TALK, Turn("user", "Again."), Turn("assistant", "3."))
SYSTEM = Turn("system", "Be brief.")


def openai(*turns):
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[turn.role], "value": turn.text} for turn in turns]}


def read(*records, form=None):
    rows = [(f"rows.jsonl line {number}", record) for number, record in enumerate(records, start=1)]
    return read_conversations(rows, form or find_format(list(records[0]), "rows.jsonl"))


@pytest.mark.parametrize(
    ("record", "form", "turns", "context"),
    [
        ({"instruction": "Add 1, 2.", "output": "3"}, "alpaca", TALK, ""),
        ({"instruction": "Add 1, 2.", "input": "", "output": "3"}, "alpaca", TALK, ""),
        ({"instruction": "Add 1, 2.", "input": None, "output": "3"}, "alpaca", TALK, ""),
        ({"output": "3", "instruction": "Add.", "input": "1, 2"}, "alpaca", (Turn("user", "Add."), TALK[1]), "1, 2"),
        ({"prompt": "Add 1, 2.", "completion": "3"}, "completion", TALK, ""),
        (openai(*MORE), "messages", MORE, ""),
        (openai(SYSTEM, *TALK), "messages", (SYSTEM, *TALK), ""),
        (sharegpt(SYSTEM, *MORE), "sharegpt", (SYSTEM, *MORE), ""),
        ({"conversations": openai(*TALK)["messages"]}, "sharegpt", TALK, ""),
    ],
)
def test_each_format_is_recognised_and_read(record, form, turns, context):
    assert find_format(list(record), "rows.jsonl") == form
    assert read(record) == ([Conversation(turns, context, "rows.jsonl line 1")], [])


def test_a_format_is_chosen_by_name_where_columns_fit_two():
    both = {"prompt": "Add 1, 2.", "completion": "3", **openai(*MORE)}
    with pytest.raises(ValueError, match=r"fit the formats messages and completion; choose one by its name"):
        find_format(list(both), "rows.jsonl")
    conversations, notes = read(both, both, form="messages")
    assert [one.turns for one in conversations] == [MORE, MORE]
    assert notes == [
        "2 rows have a column 'completion', which is not read",
        "2 rows have a column 'prompt', which is not read",
    ]


def test_columns_of_no_format_are_refused_with_the_layouts():
    with pytest.raises(ValueError, match=r"rows\.csv has the columns question, answer, which fit no format") as caught:
        find_format(["question", "answer"], "rows.csv")
    for form in FORMATS.values():
        assert ", ".join(form.needs) in str(caught.value)


def test_a_last_turn_without_an_answer_is_left_out_and_said():
    conversations, notes = read(openai(*MORE[:3]), openai(*MORE), openai(SYSTEM, *MORE[:3]))
    assert [one.turns for one in conversations] == [TALK, MORE, (SYSTEM, *TALK)]
    assert notes == ["2 rows end with a turn that has no answer, which is left out"]


def test_what_turns_hold_besides_is_said():
    record = openai(*TALK)
    record["messages"][1] |= {"weight": 0, "name": None}
    assert read(record)[1] == ["1 rows have a turn with 'weight', which is not read"]


BAD = {
    "missing column": ({"instruction": "a"}, "alpaca", "line 2: no column 'output'; columns there: instruction"),
    "empty response": ({"instruction": "a", "output": " \n"}, "alpaca", "line 2: output is an empty response"),
    "empty question": ({"instruction": "", "output": "b"}, "alpaca", "line 2: instruction is an empty text"),
    "no text": ({"instruction": "a", "output": 7}, "alpaca", "line 2: output=7 is not text"),
    "odd input": ({"instruction": "a", "input": 7, "output": "b"}, "alpaca", "line 2: input=7 is not text"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion", "line 2: completion is an empty response"),
    "no list": ({"messages": "hi"}, "messages", "line 2: messages is not a list of turns"),
    "no turns": ({"messages": []}, "messages", "line 2: messages is not a list of turns"),
    "no object": ({"messages": ["hi"]}, "messages", r"line 2: messages\[0\] has neither from and value nor role"),
    "no content": (
        {"messages": [{"role": "user", "content": None}]},
        "messages",
        r"line 2: messages\[0\] has neither from and value nor role",
    ),
    "unknown role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages",
        r"line 2: messages\[0\] has the unknown role 'tool'; known: system, user, human, assistant, gpt",
    ),
    "number": (
        {"messages": [{"role": "user", "content": 3}]},
        "messages",
        r"line 2: messages\[0\] content=3 is not text",
    ),
    "empty turn": (openai(TALK[0], Turn("assistant", " ")), "messages", r"line 2: messages\[1\] is an empty response"),
    "no assistant": (openai(TALK[0]), "messages", "line 2: messages has no assistant turn"),
    "twice": (openai(TALK[0], *TALK), "messages", r"line 2: messages\[1\] is of user where assistant should speak"),
    "answer first": (
        openai(*reversed(TALK)),
        "messages",
        r"line 2: messages\[0\] is of assistant where user should speak",
    ),
    "late system": (
        openai(*TALK, SYSTEM),
        "messages",
        r"line 2: messages\[2\] is of system where user should speak",
    ),
    "sharegpt order": (
        sharegpt(SYSTEM, TALK[1]),
        "sharegpt",
        r"line 2: conversations\[1\] is of assistant where user should speak",
    ),
}
GOOD = {
    "alpaca": {"instruction": "a", "output": "b"},
    "completion": {"prompt": "a", "completion": "b"},
    "messages": openai(*TALK),
    "sharegpt": sharegpt(*TALK),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_in_one_line_with_its_place(name):
    record, form, message = BAD[name]
    with pytest.raises(ValueError, match=r"^rows\.jsonl " + message) as caught:
        read(GOOD[form], record, GOOD[form], form=form)
    assert "\n" not in str(caught.value)


def test_all_rows_are_checked_and_the_number_of_bad_ones_is_said():
    bad = {"instruction": "a", "output": ""}
    with pytest.raises(ValueError, match=r"line 2: output is an empty response; .* \(2 more rows can't be used\)"):
        read(GOOD["alpaca"], bad, GOOD["alpaca"], bad, bad)
