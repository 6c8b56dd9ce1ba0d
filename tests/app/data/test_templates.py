"""What the model is to write in a rendered conversation: exact to the character and to the token, template by template.

The expected responses are written down beside each template; none is computed by the code under test.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support import chat
from train.data.conversations import Conversation, Turn
from train.data.templates import AlpacaTemplate, make_template
from train.data.tokens import encode_prompt, tokenize_conversations

KINDS = {"bytes": chat.byte_tokenizer, "spaces": chat.space_tokenizer}
QUESTION, ANSWER = Turn("user", "ab: b?"), Turn("assistant", "a b.\n\n  é中")
MORE = (Turn("user", "and\n"), Turn("assistant", "b"))
SYSTEM = Turn("system", "Be a b.")


def conversation(*turns, context=""):
    return Conversation(tuple(turns), context, "rows.jsonl line 3")


def counted(tokenizer, template, talk, **settings):
    """The text of each run of tokens that count in the loss."""
    examples, _ = tokenize_conversations(tokenizer, make_template(tokenizer, template), [talk], 10**6, **settings)
    ids, mask = examples.input_ids[0], examples.counted[0]
    runs, run = [], []
    for number, count in zip([*ids, -1], [*mask, False], strict=True):
        if count:
            run.append(int(number))
        elif run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (chat.CHATML, ["a b.\n\n  é中<|im_end|>", "b<|im_end|>"]),
        (chat.CHATML_SYSTEM, ["a b.\n\n  é中<|im_end|>", "b<|im_end|>"]),
        (chat.CHATML_NO_PROMPT, ["a b.\n\n  é中<|im_end|>", "b<|im_end|>"]),
        (chat.GENERATION, ["a b.\n\n  é中<|im_end|>", "b<|im_end|>"]),
        (chat.INST, [" a b.\n\n  é中</s>", " b</s>"]),
        (chat.TRIMMED, ["a b.\n\n  é中<end_of_turn>", "b<end_of_turn>"]),
        (chat.THINKING, ["a b.\n\n  é中<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]),
        (chat.OPEN, [" a b.\n\n  é中\n", " b\n</s>"]),
    ],
    ids=["chatml", "own system", "no prompt", "generation", "inst", "trimmed", "thinking", "open"],
)
def test_every_response_and_its_end_counts_and_nothing_else(kind, template, wanted):
    tokenizer = KINDS[kind](template)
    assert counted(tokenizer, "chat", conversation(QUESTION, ANSWER, *MORE)) == wanted
    assert counted(tokenizer, "chat", conversation(*MORE)) == wanted[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [chat.CHATML, chat.INST, chat.MOVED])
def test_a_system_turn_counts_nothing(kind, template):
    """INST and MOVED write it into the last question: the text before the first answer depends on what comes later."""
    tokenizer = KINDS[kind](template)
    talk = conversation(SYSTEM, QUESTION, ANSWER, *MORE)
    without = counted(tokenizer, "chat", conversation(QUESTION, ANSWER, *MORE))
    assert [text.strip() for text in counted(tokenizer, "chat", talk)] == [text.strip() for text in without]


# Texts full of what could be taken for the template's own words, with space at their ends.
texts = st.lists(
    st.sampled_from(
        ["a", "b", "ab", " ", "  ", "\n", "é", "中", "user", "assistant", ":", "### Response:", "[INST]", "model\n"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
answers = texts.filter(lambda text: text.strip())
talks = st.lists(st.tuples(answers, answers), min_size=1, max_size=3)
BYTES = {
    (name, trim): chat.byte_tokenizer(getattr(chat, name), trim)
    for name in ("CHATML", "GENERATION", "TRIMMED")
    for trim in (False, True)
}


def turns_of(talk):
    return conversation(*(Turn(*turn) for q, a in talk for turn in (("user", q), ("assistant", a))))


@given(talks, st.sampled_from(sorted(BYTES)))
def test_decoded_tokens_are_the_responses_whatever_is_in_them(talk, which):
    """A first token that a response shares with the template counts; so the text may begin with the template's end."""
    trimmed = which[0] == "TRIMMED"
    got = counted(BYTES[which], "chat", turns_of(talk))
    wanted = [a.strip() + "<end_of_turn>" if trimmed else a + "<|im_end|>" for _, a in talk]
    assert len(got) == len(wanted)
    for text, response in zip(got, wanted, strict=True):
        assert text in (response, "\n" + response)
        if not response.startswith("\n"):
            assert text == response


@given(answers, answers, st.booleans())
def test_the_response_in_the_alpaca_template_counts_to_its_last_space(question, answer, trim):
    """The text ends with the response, whose white space at the end a tokenizer may leave out of its offsets."""
    tokenizer = chat.byte_tokenizer(None, trim)
    (got,) = counted(tokenizer, "alpaca", conversation(Turn("user", question), Turn("assistant", answer)))
    assert got in (answer + "</s>", "\n" + answer + "</s>", ":\n" + answer + "</s>")
    assert got == answer + "</s>" or answer.startswith("\n")


def test_a_token_of_a_response_and_of_what_follows_counts():
    talk = conversation(QUESTION, ANSWER, *MORE)
    assert counted(chat.byte_tokenizer(chat.PARAGRAPHS), "chat", talk) == [" a b.\n\n  é中\n\n", " b\n</s>"]
    assert counted(chat.space_tokenizer(chat.PARAGRAPHS), "chat", talk) == [" a b.\n\n  é中\n", " b\n</s>"]


def test_any_character_may_stand_in_a_response():
    """The first of those that could mark places, too."""
    tokenizer = chat.byte_tokenizer(chat.CHATML_NO_PROMPT)
    assert counted(tokenizer, "chat", conversation(QUESTION, Turn("assistant", "\ue000a"))) == ["\ue000a<|im_end|>"]


@given(talks, st.booleans())
def test_masks_equal_those_of_transformers_where_it_makes_them(talk, trim):
    """Its masks need {% generation %} in the template; its offsets must be whole, which trimmed ones are not."""
    tokenizer = BYTES["GENERATION", trim]
    assume(not any(a[:1].isspace() for _, a in talk))
    messages = [{"role": role, "content": text} for q, a in talk for role, text in (("user", q), ("assistant", a))]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    examples, _ = tokenize_conversations(tokenizer, make_template(tokenizer, "chat"), [turns_of(talk)], 10**6)
    assert examples.input_ids[0].tolist() == theirs["input_ids"]
    assert examples.counted[0].tolist() == [bool(one) for one in theirs["assistant_masks"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [chat.CHATML, chat.CHATML_SYSTEM, chat.INST, chat.THINKING])
def test_token_ids_are_those_of_apply_chat_template(kind, template):
    tokenizer = KINDS[kind](template)
    talk = conversation(QUESTION, ANSWER, *MORE)
    examples, _ = tokenize_conversations(tokenizer, make_template(tokenizer, "chat"), [talk], 10**6)
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
    assert examples.input_ids[0].tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    prompt = encode_prompt(tokenizer, make_template(tokenizer, "chat"), conversation(*talk.turns[:-1]))
    assert prompt.tolist() == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]


def test_a_thought_counts_where_the_template_keeps_it():
    tokenizer = chat.byte_tokenizer(chat.THINKING)
    deep = Turn("assistant", "<think>\nb\n</think>\n\na")
    assert counted(tokenizer, "chat", conversation(QUESTION, deep, MORE[0], deep)) == [
        "a<|im_end|>",
        "<think>\nb\n</think>\n\na<|im_end|>",
    ]


WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {them}.\n\n### Input:\n1, 2\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {them}.\n\n### Response:\n"
)


@pytest.mark.parametrize(("context", "prompt"), [("1, 2", WITH_INPUT), ("", WITHOUT_INPUT)])
def test_the_alpaca_template_is_the_published_one(context, prompt):
    talk = conversation(Turn("user", "Add {them}."), Turn("assistant", "3"), context=context)
    assert AlpacaTemplate().render(talk).text == prompt + "3"
    tokenizer = chat.space_tokenizer(None)
    examples, _ = tokenize_conversations(tokenizer, AlpacaTemplate(), [talk], 10**6)
    assert counted(tokenizer, "alpaca", talk) == ["3</s>"]
    assert tokenizer.decode(examples.input_ids[0]) == "<s> " + prompt + "3</s>"
    encoded = encode_prompt(tokenizer, AlpacaTemplate(), conversation(talk.turns[0], context=context))
    assert encoded.tolist() == examples.input_ids[0][: len(encoded)].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_count_if_asked(kind):
    talk = conversation(QUESTION, ANSWER)
    (whole,) = counted(KINDS[kind](None), "alpaca", talk, loss="all")
    assert whole.removeprefix("<s> ").startswith("Below is an instruction")
    assert whole.endswith("é中</s>")


def test_the_context_follows_the_question_in_a_chat():
    talk = conversation(QUESTION, ANSWER, context="1, 2")
    text = make_template(chat.byte_tokenizer(chat.CHATML), "chat").render(talk).text
    assert text.startswith("<|im_start|>user\nab: b?\n\n1, 2<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_tells_the_date_tells_the_same_one_every_day():
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n"
    text = make_template(chat.byte_tokenizer(date + chat.CHATML), "chat").render(conversation(QUESTION, ANSWER)).text
    assert text.startswith("26 Jul 2024\n")


def refusal(action) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy():
    message = refusal(lambda: make_template(chat.byte_tokenizer(None), "chat"))
    assert "has no chat template; choose the alpaca template" in message


def test_an_unknown_template_is_refused():
    assert "no template 'vicuna'; choose chat" in refusal(lambda: make_template(chat.byte_tokenizer(None), "vicuna"))


def test_what_a_template_cannot_hold_is_refused_by_row():
    gemma = make_template(chat.byte_tokenizer(chat.TRIMMED), "chat")
    message = refusal(lambda: gemma.render(conversation(SYSTEM, QUESTION, ANSWER)))
    assert message.startswith("rows.jsonl line 3: the tokenizer's chat template refuses the turns: System role not")
    message = refusal(lambda: gemma.prompt(Conversation((SYSTEM, QUESTION))))
    assert message.startswith("the tokenizer's chat template refuses")
    message = refusal(lambda: AlpacaTemplate().render(conversation(QUESTION, ANSWER, *MORE)))
    assert message.startswith("rows.jsonl line 3: the alpaca template holds one question")
    message = refusal(lambda: AlpacaTemplate().render(conversation(SYSTEM, QUESTION, ANSWER)))
    assert message.startswith("rows.jsonl line 3: the alpaca template holds one question")


@pytest.mark.parametrize("source", [chat.REVERSING, chat.COUNTING])
def test_a_template_that_rewrites_responses_is_refused_by_row(source):
    template = make_template(chat.byte_tokenizer(source), "chat")
    message = refusal(lambda: template.render(conversation(QUESTION, ANSWER, *MORE)))
    assert message.startswith("rows.jsonl line 3: the chat template rewrites a response")


def test_without_an_end_of_text_token_open_answers_are_refused():
    tokenizer = chat.byte_tokenizer(None, eos_token=None)
    message = refusal(
        lambda: tokenize_conversations(tokenizer, AlpacaTemplate(), [conversation(QUESTION, ANSWER)], 10**6)
    )
    assert "has no end-of-text token" in message
