"""Recipes: TOML files read into configuration sections; errors tell the file, the line and the nearest key."""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from train.config.schema import Sections

RECIPES = Path(__file__).parents[1] / "recipes"
_TYPE_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read_recipe(path: Path) -> Sections:
    """The sections of a TOML file; keys it lacks keep their defaults.

    Raises:
      ValueError: no such file, not TOML, an unknown section or key, a wrong type.
    """
    if not path.is_file():
        shipped = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe at {path}; give the path of a TOML file, or one of train/recipes: {shipped}")
    return parse_recipe(path.read_bytes(), path)


def parse_recipe(content: bytes, path: Path) -> Sections:
    """`read_recipe` of what the file `path` holds, or held."""
    try:
        text = content.decode("utf-8")
        tables = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    hints = typing.get_type_hints(Sections)
    for name, table in tables.items():
        place = _place(path, text, name)
        if not isinstance(table, dict):
            raise ValueError(f"{place}: key {name} stands outside any section{perhaps(name, hints)}")
        if name not in hints:
            raise ValueError(f"{place}: unknown section {name}{perhaps(name, hints)}")
    return Sections(**{name: _read_section(path, text, name, table, hints) for name, table in tables.items()})


def check_options(words: Sequence[str]) -> None:
    """Refuses options, such as --optim.lr, that no section has; their values are not looked at.

    Raises:
      ValueError: the first unknown option, with the nearest known one.
    """
    hints = typing.get_type_hints(Sections)
    for word in words:
        if not word.startswith("--") or word == "--help":
            continue
        dotted = word.removeprefix("--").partition("=")[0].replace("-", "_")
        section, _, key = dotted.partition(".")
        known = typing.get_type_hints(hints[section]) if section in hints else {}
        if key not in known and known.get(key.removeprefix("no_")) is not bool:
            raise ValueError(f"unknown option --{dotted}{perhaps(dotted, hints)}")


def _read_section(path: Path, text: str, name: str, table: dict[str, Any], hints: dict[str, Any]) -> Any:
    known = typing.get_type_hints(hints[name])
    values = {}
    for key, value in table.items():
        dotted = f"{name}.{key}"
        if key not in known:
            raise ValueError(f"{_place(path, text, dotted)}: unknown key {dotted}{perhaps(dotted, hints)}")
        values[key] = fit_value(value, known[key], dotted, _place(path, text, dotted))
    return hints[name](**values)


def fit_value(value: Any, hint: Any, name: str, place: str = "") -> Any:
    """A value as TOML gives it, made to fit a key's type: lists become tuples, whole numbers floats.

    Raises:
      ValueError: it does not fit; tells the place, the key by `name`, and what it must be.
    """
    try:
        return _fit(value, hint)
    except TypeError:
        problem = f"{name} = {value!r} must be {_wanted(hint)}{_near(value, hint)}"
        raise ValueError(f"{place}: {problem}" if place else problem) from None


def perhaps(dotted: str, hints: dict[str, Any]) -> str:
    """The nearest known key to one that is not: of its own section, else of that name in any; else what there is."""
    keys = {section: list(typing.get_type_hints(hint)) for section, hint in hints.items()}
    section, _, key = dotted.rpartition(".")
    own = keys.get(section, list(keys))
    near = difflib.get_close_matches(key, own, n=1)
    if near:
        return f"; perhaps {section}.{near[0]}" if section else f"; perhaps [{near[0]}]"
    elsewhere = [f"{other}.{key}" for other, known in keys.items() if key in known]
    return f"; perhaps {elsewhere[0]}" if elsewhere else f"; there are {', '.join(own)}"


def _near(value: Any, hint: Any) -> str:
    """The nearest of the words that a key may have, to one that is none of them."""
    words = [word for option in (hint, *typing.get_args(hint)) for word in _words(option)]
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; perhaps {near[0]!r}" if near else ""


def _words(hint: Any) -> list[str]:
    return (
        [word for word in typing.get_args(hint) if isinstance(word, str)] if typing.get_origin(hint) is Literal else []
    )


def _place(path: Path, text: str, dotted: str) -> str:
    """The file, and the line on which `dotted` stands, as tomllib does not tell it."""
    header = ""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if table := re.fullmatch(r"\[([^\[\]]+)\]\s*(#.*)?", line):
            found = header = _plain(table[1])
        elif "=" in line:
            found = f"{header}.{_plain(line.partition('=')[0])}".removeprefix(".")
        else:
            continue
        if found == dotted or found.startswith(f"{dotted}."):
            return f"{path} line {number}"
    return str(path)


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _fit(value: Any, hint: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in options:
            try:
                return _fit(value, option)
            except TypeError:
                continue
    elif origin is Literal and value in options:
        return value
    elif origin is tuple and isinstance(value, list):
        return tuple(_fit(entry, options[0]) for entry in value)
    elif origin is dict and isinstance(value, dict):
        return {key: _fit(entry, options[1]) for key, entry in value.items()}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError(value)


def _wanted(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_wanted(option) for option in options if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin is tuple:
        return f"a list, each entry {_wanted(options[0])}"
    if origin is dict:
        return f"a table, each value {_wanted(options[1])}"
    return _TYPE_WORDS[hint]
