"""`python -m train generate`: what it prints, when answers end, and what it refuses; and text from tokens."""

from __future__ import annotations

import importlib
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import melora_jax as mj
from melora_jax.generation import stream
from tests.support.chat import CHATML, byte_tokenizer, space_tokenizer
from tests.support.talkers import BYTES, lively, talker
from tests.support.tiny import stirred
from train.__main__ import main
from train.chat.speaker import Answers, Manner, Speaker, Speed, find_template
from train.chat.text_stream import TextStream
from train.data.conversations import Conversation, Turn
from train.data.templates import AlpacaTemplate

CHAT = "<|im_start|>user\nab a<|im_end|>\n<|im_start|>assistant\n"


def streamed(tokenizer, ids, stops=()) -> tuple[list[str], TextStream]:
    """The pieces of a text, and the stream that gave them."""
    stream = TextStream(tokenizer, stops)
    return [*map(stream.push, ids), stream.finish()], stream


def cut(text: str, stops) -> str:
    """The text up to the stop string that is complete first; of those, the longest."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@given(
    st.text(st.sampled_from("ab: é中🎈\n"), max_size=30),
    st.lists(st.text(st.sampled_from("ab: é🎈"), min_size=1, max_size=4), max_size=3),
)
def test_text_comes_in_whole_characters_and_ends_before_a_stop_string(text, stops):
    """Tokens are bytes and merges across words, so stop strings and characters begin and end inside of them."""
    ids = BYTES(text)["input_ids"]
    pieces, stream = streamed(BYTES, ids, stops)
    assert "".join(pieces) == stream.text == cut(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert "\ufffd" not in stream.text
    given_out = ""
    for number, piece in enumerate(pieces[:-1], start=1):
        given_out += piece
        # never more than what is certain, and all of it: what is held back may yet become a stop string
        known = BYTES.decode(ids[:number]).rstrip("\ufffd")
        assert known.startswith(given_out)
        held = known[len(given_out) :]
        assert not held or stream.stopped or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("tokenizer", [BYTES, space_tokenizer(CHATML)])
def test_pieces_add_up_to_the_text_as_a_whole(tokenizer):
    """Also where the tokenizer puts a space before the first word, and special tokens make no text."""
    ids = tokenizer(" ab a  b: abé\n\nab", add_special_tokens=False)["input_ids"]
    ids.insert(5, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(bool(piece) for piece in pieces) > 5


def test_the_stop_string_that_is_complete_first_counts_also_within_a_token():
    whole = BYTES.convert_tokens_to_ids("Ġab")
    assert BYTES.decode(whole) == " ab"
    assert streamed(BYTES, [whole], (" ab", "a"))[1].text == " "


def test_half_a_character_is_never_given_out():
    ids = BYTES("a🎈")["input_ids"]
    pieces, _ = streamed(BYTES, ids[:-1])
    assert "".join(pieces) == "a"
    assert streamed(BYTES, ids)[0] == ["a", "", "", "", "🎈", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a tokenizer of bytes and a ChatML template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    mj.save_pretrained(talker(), folder)
    BYTES.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mj.from_pretrained(folder, task="causal-lm")


def expected(model, text: str, count: int = 9, **settings) -> str:
    """The answer that `stream` gives to a prompt, as text."""
    found = stream(model, [BYTES(text)["input_ids"]], max_new_tokens=count, **settings)
    text = BYTES.decode([new.tokens[0] for new in found], skip_special_tokens=True)
    assert text.isascii()
    assert len(set(text)) > 3
    return text


def run(capsys, *words) -> str:
    """What the command prints to standard output."""
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_prompt_is_answered_by_the_chat_template_or_as_it_is(folder, model, capsys):
    few = ("--max-new-tokens", 9)
    assert run(capsys, folder, "--prompt", "ab a", *few) == expected(model, CHAT) + "\n"
    plain = run(capsys, folder, "--prompt", "ab a", "--template", "none", *few)
    assert plain == expected(model, "ab a") + "\n"
    assert plain != expected(model, CHAT) + "\n"
    said = run(capsys, folder, "--prompt", "ab a", "--system", "b", *few)
    assert said == expected(model, "<|im_start|>system\nb<|im_end|>\n" + CHAT) + "\n"
    drawn = (*few, "--temperature", 1.5, "--top-k", 7, "--top-p", 0.9, "--seed", 3)
    settings = {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "key": jax.random.fold_in(jax.random.key(3), 0)}
    assert run(capsys, folder, "--prompt", "ab a", *drawn) == expected(model, CHAT, **settings) + "\n"


def test_an_adapter_or_the_folder_of_its_run_changes_the_answer(folder, capsys, tmp_path):
    adapted = mj.from_pretrained(folder, task="causal-lm")
    mj.adapt(adapted, mj.MELoRAConfig(n=2, r=1, targets=["q_proj", "v_proj"]), rngs=nnx.Rngs(1))
    stirred(adapted)
    mj.save_adapter(adapted, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.toml").write_text("")
    words = ("--prompt", "ab a", "--max-new-tokens", 9)
    answer = run(capsys, folder, *words, "--adapter", tmp_path / "run")
    assert answer == expected(adapted, CHAT) + "\n"
    assert answer == run(capsys, folder, *words, "--adapter", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.toml").write_text('[instruction]\ntemplate = "alpaca"\n')
    alpaca = AlpacaTemplate().prompt(Conversation((Turn("user", "a"),)))
    assert len(alpaca) > 97
    short = ("--prompt", "a", "--max-new-tokens", 9, "--adapter", tmp_path / "run")
    assert f"has {len(BYTES(alpaca)['input_ids'])} tokens" in run_refused(capsys, folder, *short)
    assert answer != run(capsys, folder, *words)


def test_a_file_of_prompts_gives_lines_of_json(folder, model, capsys, tmp_path):
    texts = ["ab a", "b", "a: ab ab"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ("--max-new-tokens", 9, "--batch-size", 2)
    first = run(capsys, folder, "--prompts", tmp_path / "p.txt", *words)
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["prompt"] for row in rows] == texts
    assert [row["answer"] for row in rows] == [expected(model, CHAT.replace("ab a", text)) for text in texts]
    assert {row["ended"] for row in rows} == {"length"}
    assert run(capsys, folder, "--prompts", tmp_path / "p.jsonl", *words) == first


def test_an_answer_ends_at_a_stop_string_or_an_end_token(folder, model, capsys):
    whole = expected(model, CHAT)
    words = (folder, "--prompt", "ab a", "--max-new-tokens", 9)
    assert run(capsys, *words, "--stop", "zzz", whole[3:5]) == whole[:3] + "\n"
    assert run(capsys, *words, "--stop", whole[-1] + "z") == whole + "\n"

    def answers(stop: tuple[str, ...] = (), **special: str) -> Answers:
        tokenizer = byte_tokenizer(CHATML, **special)
        speaker = Speaker(model, tokenizer, find_template(tokenizer, None), Manner(max_new_tokens=9, stop=stop))
        answers = speaker.answer([speaker.prompt_ids(Conversation((Turn("user", "ab a"),)))])
        assert "".join(piece for [piece] in answers) == answers.texts[0]
        return answers

    assert answers().ended == ["length"]
    stopped = answers(stop=(whole[3:5],))
    assert stopped.ended == ["stop"]
    assert stopped.speed.tokens == 5
    # an end token of the tokenizer's, which makes no text, or of the text itself
    ended = answers(eos_token=whole[4])
    assert (ended.ended, ended.texts) == (["end"], [whole[: whole.index(whole[4])]])
    assert answers(eos_token="zzz").ended == ["length"]


def test_a_conversation_goes_on_until_an_empty_line(folder, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab a\nb\n\nab a\n"))
    printed = run(capsys, folder, "--max-new-tokens", 9)
    first = expected(model, CHAT)
    second = expected(model, f"{CHAT}{first}<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")
    assert printed == f"{first}\n{second}\n{first}\n"


def test_speed_leaves_out_the_first_token():
    speed = Speed(5, 4, 3.0, 2.0) + Speed(1, 0, 1.0, 0.0)
    assert str(speed) == "6 tokens, 2.0 tokens/s, the first after 4.0 s"
    assert str(Speed(1, 0, 1.0, 0.0)) == "1 tokens, the first after 1.0 s"


def run_refused(capsys, *words) -> str:
    assert main(["generate", *map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_what_is_refused(folder, capsys, tmp_path, monkeypatch):
    one = ("--prompt", "a")
    assert "--prompt and --prompts are both given" in run_refused(capsys, folder, *one, "--prompts", "p.txt")
    assert "no file at" in run_refused(capsys, folder, "--prompts", tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    assert "p.txt line 2: the prompt is ''" in run_refused(capsys, folder, "--prompts", tmp_path / "p.txt")
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    assert "no column 'prompt'" in run_refused(capsys, folder, "--prompts", tmp_path / "p.jsonl")
    assert "no tokenizer at" in run_refused(capsys, tmp_path, *one)
    assert "context of 97" in run_refused(capsys, folder, *one)
    room = 97 - len(BYTES(CHAT.replace("ab a", "a"))["input_ids"])
    assert f"at most {room}" in run_refused(capsys, folder, *one, "--max-new-tokens", room + 1)
    assert "temperature=-1.0" in run_refused(capsys, folder, *one, "--max-new-tokens", 9, "--temperature", -1)
    assert "--stop has an empty string" in run_refused(capsys, folder, *one, "--stop", "")
    assert "is not an adapter folder" in run_refused(capsys, folder, *one, "--adapter", tmp_path)
    plain = tmp_path / "plain"
    mj.save_pretrained(talker(), plain)
    byte_tokenizer(None).save_pretrained(plain)
    assert "has no chat template; choose" in run_refused(capsys, plain, *one, "--template", "chat")
    assert "--system is for a chat template" in run_refused(capsys, plain, *one, "--system", "b")


def test_a_vocabulary_that_does_not_match_is_refused(tmp_path, capsys):
    mj.save_pretrained(lively(), tmp_path)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    assert "use the tokenizer of this checkpoint" in run_refused(capsys, tmp_path, "--prompt", "a")


@pytest.mark.parametrize(("stop", "drawn"), [("Aw9", {}), ("ABCDEFGHIJKLMabcdefghi", {"temperature": 1.5, "seed": 5})])
def test_answers_that_have_ended_leave_the_batch(model, monkeypatch, stop, drawn):
    """The texts are those of the whole batch."""
    sizes = []

    def recorded(tokens):
        sizes.append(len(tokens))
        return checked(tokens)

    generation = importlib.import_module(
        "melora_jax.generation.generate"
    )  # the package exports a function of this name
    checked = generation._checked_tokens
    monkeypatch.setattr(generation, "_checked_tokens", recorded)
    prompts = [
        np.asarray(BYTES(text)["input_ids"], np.int32) for text in ("ab a", "b", "a: ab", "bb", "aab", ":", "a", "ba")
    ]
    speaker = Speaker(model, BYTES, None, Manner(max_new_tokens=40, stop=tuple(stop), **drawn))
    found = {}
    for shrink in (False, True):
        sizes.clear()
        answers = speaker.answer(prompts, shrink=shrink)
        for pieces in answers:
            assert len(pieces) == len(prompts)
        found[shrink] = answers.texts, answers.ended, answers.speed.tokens
        assert set(sizes) == ({8, 2} if shrink else {8})
    assert found[True] == found[False]
    assert len({len(text) for text in found[True][0]}) > 3
