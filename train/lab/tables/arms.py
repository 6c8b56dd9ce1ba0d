"""The arms of a comparison: a method with its settings, in one word such as `melora:n=8,r=2`."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from train.config.methods import section_for
from train.config.recipe import fit_value, perhaps
from train.config.run_config import RunConfig
from train.config.schema import Sections


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a table. `settings` maps dotted keys of a recipe, such as adapter.n, to values."""

    word: str
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The word as a name for a folder: melora-n8-r2."""
        return re.sub(r"[^a-z0-9.+-]+", "-", self.word.lower().replace("=", "").replace(".", "-")).strip("-")

    def configured(self, config: RunConfig, **more: Any) -> RunConfig:
        """`config` overridden by the arm's settings and by `more`, whose names are section__key.

        Raises:
          ValueError: settings that do not fit together; the message names the arm.
        """
        changes: dict[str, dict[str, Any]] = {}
        for dotted, value in [
            *self.settings.items(),
            *((key.replace("__", "."), value) for key, value in more.items()),
        ]:
            section, _, key = dotted.partition(".")
            changes.setdefault(section, {})[key] = value
        sections: dict[str, Any] = {name: getattr(config, name) for name in changes}
        # The arm's method may differ from the recipe's; it takes over the adapter settings that it has too.
        sections["adapter"] = section_for(self.settings["adapter.method"], config.adapter)
        try:
            replaced = {name: dataclasses.replace(section, **changes[name]) for name, section in sections.items()}
            return dataclasses.replace(config, **replaced)
        except ValueError as error:
            raise ValueError(f"{self.word}: {error}") from None


def arm_from_word(word: str) -> Arm:
    """The arm that METHOD or METHOD:KEY=VALUE,... names. A key without a section belongs to [adapter].

    Raises:
      ValueError: an unknown key, or a value of the wrong kind.

    >>> dict(arm_from_word("melora:n=4,r=2").settings)
    {'adapter.method': 'melora', 'adapter.n': 4, 'adapter.r': 2}
    """
    method, colon, rest = word.partition(":")
    hints = typing.get_type_hints(Sections)
    settings: dict[str, Any] = {"adapter.method": _value(word, "adapter.method", method, hints)}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{word}: {part!r} is not KEY=VALUE; e.g. melora:n=8,r=2")
        dotted = key if "." in key else f"adapter.{key}"
        if dotted in settings:
            raise ValueError(f"{word}: {dotted} is given twice; once is enough")
        settings[dotted] = _value(word, dotted, value, hints)
    return Arm(word, settings)


def arms_from_words(words: Sequence[str]) -> list[Arm]:
    """The arms, each once.

    Raises:
      ValueError: no arm, an arm twice, or as in `arm_from_word`.
    """
    arms = [arm_from_word(word) for word in words]
    if not arms:
        raise ValueError("there is no method to run; give some, e.g. --methods head lora:r=8 melora:n=8,r=8")
    for number, arm in enumerate(arms):
        for other in arms[:number]:
            if arm.settings == other.settings:
                raise ValueError(f"{other.word} and {arm.word} are the same method; give it once")
    return arms


def _value(word: str, dotted: str, text: str, hints: Mapping[str, Any]) -> Any:
    """The text converted to the type of the key."""
    section, _, key = dotted.partition(".")
    known = typing.get_type_hints(hints[section]) if section in hints else {}
    if key not in known:
        raise ValueError(f"{word}: unknown key {dotted}{perhaps(dotted, dict(hints))}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a string without quotes
    return fit_value(value, known[key], f"{word}: {dotted}")
