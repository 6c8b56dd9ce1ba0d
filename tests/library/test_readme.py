"""Every code block of README.md, run.

Conventions. `python` blocks run in order, as one script. A `toml` block begins with a comment that names its file
(`# my.toml`), under which commands find it. In `sh` blocks the commands of this project run in order, on few rows for
few steps where they train; of a hub data set only the configuration is checked; make targets and extras are looked
up. All of it happens in an empty folder, where MiniLM lies under each model's name and 64 of the demo's sentences
(columns text, sentence and label) under each name of a .jsonl file; where conversations are trained on, a tiny decoder
and rows of prompt and completion. What a command prints is shown in `text` blocks.
Another language, or a command not known here, fails: teach this file how to check it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.tiny_run import make_decoder, make_instructions
from train.config.run_config import from_toml

ROOT = Path(__file__).resolve().parents[2]
MODEL = re.compile(r"""from_pretrained\(\s*["']([^"']+)["']""")
DATA = re.compile(r"[\w./-]+\.jsonl\b")
NEEDS_TORCH = re.compile(r"\bimport (torch|peft)\b|\bfrom (torch|peft)\b|\bAutoModel")
FEW = ["--train.max_steps", "2", "--train.batch_size", "8", "--data.train_limit", "64", "--data.eval_limit", "32"]
FEW += ["--data.max_length", "48", "--data.buckets", "48"]  # one width, so one program to compile
FEW_CHATS = ["--train.max_steps", "2", "--train.batch_size", "2", "--data.max_length", "40", "--adapter.n", "2"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of README.md on which the text begins."""

    language: str
    text: str
    line: int

    @property
    def file_name(self) -> str:
        named = re.match(r"# ([\w-]+\.toml)\b", self.text)
        assert named, f"README.md line {self.line}: begin the toml block with a comment that names its file"
        return named[1]

    def commands(self) -> list[list[str]]:
        """The words of each command, less comments and settings of the environment."""
        text = self.text.replace("\\\n", " ").replace("&&", "\n")
        lines = [shlex.split(line, comments=True) for line in text.splitlines()]
        return [words for line in lines if (words := [w for w in line if not re.match(r"[A-Z_]+=", w)])]


def _blocks(*languages: str) -> list[Block]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\S*)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    blocks = [Block(fence[1], fence[2], readme.count("\n", 0, fence.start(2)) + 1) for fence in fences]
    return [block for block in blocks if not languages or block.language in languages]


@pytest.fixture
def folder(tmp_path, monkeypatch, minilm_folder, movie_reviews) -> Path:
    """The current folder: the project's packages and what the blocks name."""
    monkeypatch.chdir(tmp_path)
    for package in ("melora_jax", "train"):
        Path(package).symlink_to(ROOT / package)
    shown = "\n".join(block.text for block in _blocks("python", "sh", "toml"))
    for model in MODEL.findall(shown):
        _link(Path(model), minilm_folder)
    reviews = [json.loads(line) for line in movie_reviews[0].read_text(encoding="utf-8").split("\n")[:64]]
    rows = "".join(json.dumps({**review, "text": review["sentence"]}) + "\n" for review in reviews)
    for name in DATA.findall(shown):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(rows, encoding="utf-8")
    for block in _blocks("toml"):
        Path(block.file_name).write_text(block.text, encoding="utf-8")
    return tmp_path


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def _run(*command: str, cwd: Path | None = None) -> None:
    # A make above this test would hand its own flags down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_every_block_is_of_a_kind_that_is_checked():
    unknown = {
        block.line: block.language for block in _blocks() if block.language not in {"python", "sh", "toml", "text"}
    }
    assert not unknown
    assert {"python", "sh"} <= {block.language for block in _blocks()}


@pytest.mark.usefixtures("folder")
def test_python_blocks_run_in_order():
    torch_is_here = importlib.util.find_spec("torch") is not None
    lines: list[str] = []
    for block in _blocks("python"):
        if torch_is_here or not NEEDS_TORCH.search(block.text):
            # Each line at its place, so that a traceback names the line of README.md.
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    Path("README.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run(sys.executable, "README.py")


@pytest.mark.usefixtures("folder")
def test_toml_blocks_are_recipes():
    for block in _blocks("toml"):
        from_toml(block.file_name)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_commands_do_what_they_say(minilm_folder):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for block in _blocks("sh"):
        for words in block.commands():
            match words:
                case ["git", "clone", _] | ["cd", _]:
                    pass
                case ["make", *goals]:
                    _run("make", "--dry-run", *goals, cwd=ROOT)
                case [_, "install", *packages] if words[0].endswith("pip"):
                    wanted = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", " ".join(packages))))
                    assert set(wanted) <= set(extras), f"README.md line {block.line}: unknown extra in {words}"
                case [_, "-m", "train", "run", recipe, *overrides]:
                    _run_recipe(recipe, overrides, minilm_folder)
                case [_, "-m", "train", "sweep", recipe, *rest]:
                    _link(Path(from_toml(recipe).model.name), minilm_folder)
                    if from_toml(recipe).data.name:
                        _run(sys.executable, "-m", "train", "sweep", recipe, *rest, "--dry-run")
                    else:
                        few = _with(_short_lists(rest), "--seeds", "1")
                        _run(sys.executable, "-m", "train", "sweep", recipe, *few, *FEW, "--output.folder", "runs/grid")
                case [_, "-m", "train", "glue", *rest]:
                    _run(sys.executable, "-m", "train", "glue", "--dry-run", *rest)
                case [_, "-m", "train", "eval", *_]:
                    pass  # lm-eval's tasks are the hub's; test_eval_command.py runs the command
                case [_, "-m", "train", "crash-test", recipe, *rest]:
                    _run(sys.executable, "-m", "train", "crash-test", recipe, *_with(rest, "--kills", "1"), *FEW)
                case [_, "-m", "train", "bench" | "bench-population" as command, *rest]:
                    _run(sys.executable, "-m", "train", command, *_with(rest, "--rounds", "1"), "--length", "8")
                case [_, "-m", "train", "generate", *rest]:
                    _run(sys.executable, "-m", "train", "generate", *rest, "--max-new-tokens", "5")
                case [_, "-m", "train" | "melora_jax" as package, *rest]:
                    _run(sys.executable, "-m", package, *rest)
                case _:
                    pytest.fail(f"README.md line {block.line}: don't know how to check {shlex.join(words)}")


def _with(words: list[str], option: str, value: str) -> list[str]:
    """The words with another value of an option."""
    if option not in words:
        return [*words, option, value]
    place = words.index(option)
    return [*words[: place + 1], value, *words[place + 2 :]]


def _short_lists(words: list[str]) -> list[str]:
    """A grid's words, each list of values cut to its first two."""
    return [re.sub(r"^([\w.]+=[^,]+,[^,]+),.*", r"\1", word) for word in words]


def _run_recipe(recipe: str, overrides: list[str], model: Path) -> None:
    options = [word for word in overrides if word not in ("--resume", "--help")]
    config = from_toml(recipe, options)
    if config.model.task == "causal-lm":
        # A decoder so small that its run costs nothing, and conversations in its few words.
        make_decoder(Path(config.model.name))
        make_instructions(Path(str(config.data.train)), 53)
        _run(sys.executable, "-m", "train", "run", recipe, *overrides, *FEW_CHATS)
    elif not config.data.name:
        _link(Path(config.model.name), model)
        _run(sys.executable, "-m", "train", "run", recipe, *overrides, *FEW)
