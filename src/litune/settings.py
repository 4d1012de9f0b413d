"""What a setting is: a field of a config with its type, its bounds, and the one way in which its values are read.

    image_tower: str                                 text that must be given
    max_damaged: Annotated[float, SHARE] = 0.01      the bound stands beside the field
    pairs: Annotated[Address, Place("PAIRS")]        without a name on the command line: told by its place

Words of the command line, TOML, JSON and keyword arguments pass through `Setting`, so that all say the same of a value
that can't be read; `check` holds the bounds against every config that is made. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from litune.errors import ConfigError, nearest


@dataclass(frozen=True)
class Rule:
    """A bound of a value, and what is said of one that is beyond it."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Place:
    """Marks a setting that the command line tells by its place, with what stands for it in the help."""

    placeholder: str


@dataclass(frozen=True)
class Repeated:
    """Marks a setting of several values whose option is given once for each."""


def at_least(least: int) -> Rule:
    """The bound of a number that is `least` or more."""
    return Rule(f"it must be at least {least}", lambda value: value >= least)


def at_most(most: int) -> Rule:
    """The bound of a number that is `most` or less."""
    return Rule(f"it must be at most {most}", lambda value: value <= most)


SHARE = Rule("it must be between 0 and 1", lambda value: 0 <= value <= 1)
COSINE = Rule("it must be between -1 and 1", lambda value: -1 <= value <= 1)
BELOW_ONE = Rule("it must be at least 0 and less than 1", lambda value: 0 <= value < 1)
WITHIN_ONE = Rule("it must be more than 0 and less than 1", lambda value: 0 < value < 1)
POSITIVE = Rule("it must be positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("it must not be negative", lambda value: value >= 0)
FINITE = Rule("it must be finite", math.isfinite)
AN_ADDRESS = Rule("it must be a path or a URL", lambda address: address != "")
A_FILE = Rule("it is a folder, it must be a file", lambda path: not path.is_dir())

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    Path: "a path",
    str: "text",
}
"""What a value must be, by the type of its field."""


@dataclass(frozen=True)
class Setting:
    """A field of a config."""

    name: str
    kind: Any
    """The type of a value: of one, where several are taken. Of a few choices it is `Literal`, of an address text."""
    choices: tuple[Any, ...]
    """The only values, where these are few."""
    several: bool
    """Whether it takes any number of values."""
    optional: bool
    """Whether it can be None."""
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    rules: tuple[Rule, ...]
    place: str | None
    """What stands for it, where the command line tells it by its place."""
    repeated: bool

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def words(self) -> str:
        """How it is written on the command line: --its-name, or what stands for it."""
        return self.place.strip(".") if self.place else "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """One value out of a word of the command line. Raises `ConfigError` for a word that can't be read."""
        if text != text.encode(errors="ignore").decode():
            raise ConfigError(f"{self.words} is {text!r}, it is not UTF-8: rename what it names")
        if self.kind in (int, float):
            with suppress(ValueError):
                return self.kind(text)
        return self.convert(text, self.words)

    def read(self, value: Any, where: str) -> Any:
        """A plain value as the field has it: paths out of text, tuples out of lists, or out of a lone value.

        Raises `ConfigError` that begins with `where` for a value of another type.
        """
        if value is None and self.optional:
            return None
        if self.several:
            values = value if isinstance(value, Iterable) and not isinstance(value, str | dict) else [value]
            return tuple(self.convert(member, where) for member in values)
        return self.convert(value, where)

    def convert(self, value: Any, where: str) -> Any:
        """As `read`, of one value where several are taken."""
        if self.choices or (self.kind is str and isinstance(value, os.PathLike)):
            return value  # `check` knows the choices; a path is an address as well
        if isinstance(value, bool) and self.kind is not bool:
            pass
        elif self.kind is Path and isinstance(value, str | os.PathLike) and value != "":
            return Path(value)
        elif self.kind is float and isinstance(value, numbers.Real):
            return float(value)
        elif self.kind is int and isinstance(value, numbers.Integral):
            return int(value)
        elif self.kind is not Path and isinstance(value, self.kind):
            return value
        raise ConfigError(f"{where} is {value!r}, it must be {KINDS[self.kind]}")

    def check(self, value: Any) -> None:
        """Raise `ConfigError` if a value that the field has, or one of several, is beyond its bounds."""
        shown = repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
        if self.choices and value not in self.choices:
            close = nearest(value, self.choices, 1) if isinstance(value, str) else ""
            also = f" ({close})" if close.startswith("perhaps") else ""
            choices = ", ".join(map(str, self.choices))
            raise ConfigError(f"{self.words} is {shown}, it must be one of {choices}{also}")
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{self.words} is {shown}, it must be a number")
        for rule in self.rules:
            if not rule.holds(value):
                raise ConfigError(f"{self.words} is {shown}, {rule.words}")


def settings_of(config: type[Any]) -> tuple[Setting, ...]:
    """All settings of a class of configs, in its order."""
    return _settings_of(cast(Hashable, config))  # mypy takes no class for hashable


@cache
def _settings_of(config: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(config, include_extras=True)
    return tuple(setting_of(field, hints[field.name]) for field in dataclasses.fields(config))


def setting_of(field: dataclasses.Field[Any], hint: Any) -> Setting:
    """The setting that a field with this annotation is."""
    markers: list[Any] = []
    several = optional = False
    while get_origin(hint) in (Annotated, Union, types.UnionType, tuple):
        inner = get_args(hint)
        if get_origin(hint) is Annotated:
            markers += inner[1:]
        several |= get_origin(hint) is tuple
        optional |= type(None) in inner
        hint = next(member for member in inner if member is not type(None))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Setting(
        name=field.name,
        kind=get_origin(hint) or hint,
        choices=get_args(hint) if get_origin(hint) is Literal else (),
        several=several,
        optional=optional,
        default=default,
        rules=tuple(marker for marker in markers if isinstance(marker, Rule)),
        place=next((marker.placeholder for marker in markers if isinstance(marker, Place)), None),
        repeated=any(isinstance(marker, Repeated) for marker in markers),
    )


def check(config: Any) -> None:
    """Raise `ConfigError` for the first setting of a config whose value is beyond its bounds."""
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        for member in value if setting.several else (value,):
            if member is not None:
                setting.check(member)
