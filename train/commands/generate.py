"""`python -m train generate`: prompts from the command line, a file or a conversation, answered by a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

import melora_jax as mj
from train.chat.speaker import (
    Answers,
    Manner,
    Speaker,
    Speed,
    adapter_folder,
    find_template,
    template_of_run,
)
from train.data.conversations import Conversation, Turn
from train.data.files import read_table, require_file
from train.data.tokens import read_tokenizer


@dataclasses.dataclass(frozen=True)
class Options(Manner):
    """Answers a prompt, a file of prompts, or, without either, each line that is typed."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a .gguf file or a hub id."""
    adapter: str | None = None
    """A run's folder, or the folder of an adapter."""
    prompt: str | None = None
    """The prompt to answer."""
    prompts: str | None = None
    """A file of prompts: .txt with one on each line, or .jsonl, .csv and so on with a column "prompt". Answers are
    printed as JSON, one on each line."""
    system: str | None = None
    """The system turn of the chat template."""
    template: Literal["chat", "alpaca", "none"] | None = None
    """The template of the text for the model: the tokenizer's own chat template, Stanford Alpaca's, or none. By default
    the one of the adapter's run or, without a run, the tokenizer's own, if it has one."""
    batch_size: int = 8
    """How many prompts of a file are answered together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model."""


def generate(words: Sequence[str]) -> int:
    """Answers by the options; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train generate")
    _check(options)
    tokenizer = read_tokenizer(options.model)
    trained_with = None if options.adapter is None else template_of_run(options.adapter)
    template = find_template(tokenizer, options.template or trained_with)
    if options.system is not None and template is None:
        raise ValueError("--system is for a chat template, and none is used here; leave it out")
    questions = _questions(options)
    model = mj.from_pretrained(options.model, task="causal-lm", dtype=options.dtype)
    if options.adapter is not None:
        mj.load_adapter(model, adapter_folder(options.adapter))
    names = [field.name for field in dataclasses.fields(Manner)]
    speaker = Speaker(model, tokenizer, template, Manner(**{name: getattr(options, name) for name in names}))
    if options.prompt is not None:
        _answer_one(speaker, questions[0])
    elif options.prompts is not None:
        _answer_file(speaker, questions, options.batch_size)
    else:
        _converse(speaker, _system_turn(options))
    return 0


def _check(options: Options) -> None:
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("--prompt and --prompts are both given; choose one, or neither to type prompts line by line")
    if "" in options.stop:
        raise ValueError("--stop has an empty string, which would end every answer at once; leave it out")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")


def _system_turn(options: Options) -> tuple[Turn, ...]:
    return () if options.system is None else (Turn("system", options.system),)


def _questions(options: Options) -> list[Conversation]:
    """The prompts of the options, each as a conversation."""
    if options.prompt is not None:
        texts = [("--prompt", options.prompt)]
    elif options.prompts is not None:
        texts = list(_read_prompts(Path(options.prompts)))
    else:
        return []
    for place, text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: the prompt is {text!r}; write some text, or leave it out")
    return [Conversation((*_system_turn(options), Turn("user", text)), place=place) for place, text in texts]


def _read_prompts(path: Path) -> Iterator[tuple[str, str]]:
    """The place and text of each prompt."""
    if path.suffix.lower() != ".txt":
        table = read_table(path, ["prompt"])
        yield from ((table.where(row), text) for row, text in enumerate(table.columns["prompt"]))
        return
    require_file(path)
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    yield from ((f"{path} line {number}", line) for number, line in enumerate(lines, start=1))


def _answer_one(speaker: Speaker, question: Conversation) -> None:
    _print_pieces(speaker.answer([speaker.prompt_ids(question)]))


def _print_pieces(answers: Answers) -> None:
    """Prints the one answer as it comes, then its speed."""
    for [piece] in answers:
        print(piece, end="", flush=True)
    print()
    _say(str(answers.speed))


def _answer_file(speaker: Speaker, questions: Sequence[Conversation], batch_size: int) -> None:
    speed = Speed()
    prompts = [speaker.prompt_ids(question) for question in questions]
    for start in range(0, len(questions), batch_size):
        batch = slice(start, start + batch_size)
        answers = speaker.answer(prompts[batch], start)
        for _ in answers:
            pass
        for question, text, ended in zip(questions[batch], answers.texts, answers.ended, strict=True):
            record = {"prompt": question.turns[-1].text, "answer": text, "ended": ended}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        speed += answers.speed
    _say(str(speed))


def _converse(speaker: Speaker, system: tuple[Turn, ...]) -> None:
    """Answers line after line; with a chat template, lines up to an empty one are one conversation."""
    typed = sys.stdin.isatty()
    if typed:
        _say("One prompt a line. Ctrl-C stops an answer, an empty line starts a new conversation, Ctrl-D ends.")
    turns = system
    for number, line in enumerate(_lines(typed)):
        if not line.strip():
            turns = system
            continue
        question = Conversation((*turns, Turn("user", line)), place="this conversation")
        try:
            answers = speaker.answer([speaker.prompt_ids(question)], number)
        except ValueError as error:
            if not typed:
                raise
            _say(f"error: {error} (an empty line starts a new conversation)")
            continue
        try:
            _print_pieces(answers)
        except KeyboardInterrupt:
            _say(" (stopped)")
        if speaker.remembers:
            turns = (*question.turns, Turn("assistant", answers.texts[0]))


def _lines(typed: bool) -> Iterator[str]:
    if not typed:
        yield from (line.removesuffix("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _say(text: str) -> None:
    """Prints for the person at the terminal, so not into a file of answers."""
    print(text, file=sys.stderr, flush=True)
