"""Cutting at a maximum length: what is left, what counts, and that the report tells all that was lost."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import chat
from train.data.conversations import Conversation, Turn
from train.data.templates import AlpacaTemplate, make_template
from train.data.tokens import tokenize_conversations

TOKENIZER = chat.byte_tokenizer(chat.CHATML)
CHAT = make_template(TOKENIZER, "chat")


def talk(question, answer, place="rows.jsonl line 1"):
    return Conversation((Turn("user", question), Turn("assistant", answer)), place=place)


def tokenize(rows, max_length, **settings):
    return tokenize_conversations(TOKENIZER, CHAT, rows, max_length, **settings)


# In tokens, one a letter: <|im_start|>user\n .. <|im_end|>\n is 8, <|im_start|>assistant\n is 11, <|im_end|>\n is 2.
ROWS = [
    talk("q" * asked, "x" * said, f"rows.jsonl line {asked}") for asked, said in ((3, 5), (4, 30), (40, 2), (50, 1))
]
FULL = [3 + 5 + 21, 4 + 30 + 21, 40 + 2 + 21, 50 + 1 + 21]


def test_short_rows_are_whole():
    examples, report = tokenize(ROWS, 1000)
    assert examples.lengths.tolist() == FULL
    assert [int(mask.sum()) for mask in examples.counted] == [6, 31, 3, 2]
    assert (report.rows, report.truncated, report.tokens_lost, report.without_response) == (4, 0, 0, 0)
    assert (report.counted, report.tokens, report.longest) == (42, sum(FULL), 72)


def test_long_rows_keep_their_first_tokens_and_the_rest_is_counted():
    whole, _ = tokenize(ROWS, 1000)
    examples, report = tokenize(ROWS, 40)
    for row, (ids, mask) in enumerate(zip(examples.input_ids, examples.counted, strict=True)):
        assert ids.tolist() == whole.input_ids[row][:40].tolist()
        assert mask.tolist() == whole.counted[row][:40].tolist()
    assert examples.lengths.tolist() == [29, 40]
    assert [int(mask.sum()) for mask in examples.counted] == [6, 40 - 8 - 4 - 11]
    assert str(report) == (
        "4 rows, tokens median 59, p95 71, longest 72; 3 cut to 40, 70 tokens lost; "
        "2 lost their whole response and were dropped; 23 of 69 tokens count in the loss"
    )


def test_with_the_loss_on_all_tokens_rows_without_a_response_stay_and_are_counted():
    examples, report = tokenize(ROWS, 40, loss="all")
    assert examples.lengths.tolist() == [29, 40, 40, 40]
    assert all(mask.all() for mask in examples.counted)
    assert "2 lost their whole response and were kept for the loss on all tokens; 149 of 149" in str(report)


def test_a_lost_response_is_an_error_if_asked():
    with pytest.raises(
        ValueError, match=r"^rows\.jsonl line 40 keeps no token of its response .*=40 \(1 more rows too"
    ):
        tokenize(ROWS, 40, lost="error")
    assert tokenize(ROWS[:2], 40, lost="error")[1].truncated == 1


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"no row keeps a token of its response at data\.max_length=20; raise it"):
        tokenize(ROWS, 20)


def test_a_length_the_model_cannot_take_is_refused():
    small = chat.byte_tokenizer(chat.CHATML, model_max_length=64)
    with pytest.raises(ValueError, match=r"data\.max_length=65 is over the 64 tokens"):
        tokenize_conversations(small, make_template(small, "chat"), ROWS, 65)


def test_the_end_of_text_is_cut_off_with_the_rest():
    tokenizer = chat.byte_tokenizer(None)
    whole, _ = tokenize_conversations(tokenizer, AlpacaTemplate(), [talk("q", "xxx")], 1000)
    assert whole.input_ids[0][-1] == tokenizer.eos_token_id
    length = len(whole.input_ids[0])
    cut, report = tokenize_conversations(tokenizer, AlpacaTemplate(), [talk("q", "xxx")], length - 1)
    assert cut.input_ids[0].tolist() == whole.input_ids[0][:-1].tolist()
    assert report.tokens_lost == 1


def test_an_end_of_text_that_the_tokenizer_sets_is_not_doubled():
    from tokenizers import processors

    tokenizer = chat.byte_tokenizer(None)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", end)])
    examples, _ = tokenize_conversations(tokenizer, AlpacaTemplate(), [talk("q", "xxx")], 1000)
    assert examples.input_ids[0][-4:].tolist() == [*tokenizer("xxx", add_special_tokens=False)["input_ids"], end]
    assert np.flatnonzero(examples.counted[0]).tolist() == list(
        range(len(examples.counted[0]) - 4, len(examples.counted[0]))
    )


def test_a_tokenizer_without_places_is_refused(monkeypatch):
    slow = chat.byte_tokenizer(chat.CHATML)
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ValueError, match=r"can't tell where in the text its tokens stand; save a fast one"):
        tokenize_conversations(slow, CHAT, ROWS, 1000)


def test_more_rows_than_one_piece_stay_in_order():
    rows = [talk("q", "x" * (1 + number % 7)) for number in range(2003)]
    examples, _ = tokenize(rows, 1000)
    assert examples.lengths.tolist() == [23 + number % 7 for number in range(2003)]
