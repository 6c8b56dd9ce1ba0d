"""docs/architecture.md names the packages, import layers and functions that the code has."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("melora_jax", "train", "tests")


@pytest.fixture(scope="module")
def document() -> str:
    return (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _section(document: str, title: str) -> str:
    return re.split(r"^## ", document.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def _drawn(document: str) -> dict[str, str]:
    """What the trees say of each folder and file, by its path."""
    found: dict[str, str] = {}
    folders: list[str] = []
    trees = "".join(re.findall(r"```text\n(.*?)```", document, re.DOTALL))
    for indent, name, text in re.findall(r"^( *)(\S+) *(.*)$", trees, re.MULTILINE):
        folders[len(indent) // 2 :] = [name.rstrip("/")]
        found["/".join(folders) + ("/" if name.endswith("/") else "")] = text
    return found


def test_the_trees_name_every_package_and_every_file_beside_packages(document: str) -> None:
    drawn = _drawn(_section(document, "Rooms"))
    packages = {f"{file.parent.relative_to(ROOT)}/" for tree in TREES for file in (ROOT / tree).rglob("__init__.py")}
    assert {path for path in drawn if path.endswith("/")} == packages
    files = {
        str(file.relative_to(ROOT))
        for tree in TREES
        for file in (ROOT / tree).glob("*.py")
        if file.name not in ("__init__.py", "__main__.py")
    }
    assert {path for path in drawn if path.endswith(".py")} == files
    assert not [path for path, text in drawn.items() if not text]


def test_the_layers_are_those_of_the_import_contracts(document: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contracts = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    assert contracts
    written = re.findall(r"```text\n(.*?)```", _section(document, "Imports"), re.DOTALL)
    assert [block.split("\n")[:-1] for block in written] == [contract["layers"] for contract in contracts]


def _names(file: str) -> set[str]:
    """The functions, classes and methods that a file defines."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    definitions = (ast.FunctionDef, ast.ClassDef)
    outer = [node for node in tree.body if isinstance(node, definitions)]
    inner = [f"{node.name}.{part.name}" for node in outer for part in node.body if isinstance(part, definitions)]
    return {node.name for node in outer} | set(inner)


def test_every_function_on_the_walks_is_where_the_walk_says(document: str) -> None:
    walks = re.split(r"^### ", _section(document, "Walks"), flags=re.MULTILINE)[1:]
    assert len(walks) == 4
    for walk in walks:
        stays = re.findall(r"^\d+\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", walk, re.MULTILINE)
        assert len(stays) == len(re.findall(r"^\d+\.", walk, re.MULTILINE)), walk.split("\n")[0]
        for file, functions in stays:
            assert set(re.findall(r"`([\w.]+)`", functions)) <= _names(file), file


@pytest.mark.parametrize(("walk", "stays", "returns"), [(0, 7, 0), (1, 7, 0), (2, 15, 3), (3, 15, 3)])
def test_the_walks_are_short(document: str, walk: int, stays: int, returns: int) -> None:
    text = re.split(r"^### ", _section(document, "Walks"), flags=re.MULTILINE)[1 + walk]
    files = re.findall(r"^\d+\. `([\w/]+\.py)`:", text, re.MULTILINE)
    assert len(files) <= stays
    assert len(files) - len(set(files)) <= returns
