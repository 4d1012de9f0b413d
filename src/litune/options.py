"""The settings of a config as options of the command line, and a form of them as tyro is to show it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from litune.config import DedupConfig, EmbedConfig, EvalConfig, FilterConfig, TuneConfig
from litune.errors import nearest

GROUPS: dict[type[Any], dict[str, str]] = {
    EmbedConfig: {"images": "data", "batch_size": "encoding", "store_dtype": "output"},
    TuneConfig: {
        "mix": "data",
        "locking": "tower",
        "loss": "loss",
        "duration": "schedule",
        "optimizer": "optimizer",
        "schedule": "schedule",
        "image_rate": "picture",
        "precision": "run",
    },
    EvalConfig: {"store": "data", "tasks": "task", "out": "output"},
    FilterConfig: {"images": "data", "dropped": "output", "preset": "rule", "seed": "other"},
    DedupConfig: {"images": "data", "against": "duplicate", "overwrite": "other"},
}
"""Where a config has many settings: the first of each group, and the group's name."""

PLACEHOLDERS = {int: "N", float: "X", str: "NAME", Path: "PATH"}
NAMED = {
    "image_tower": "TOWER",
    "text_tower": "TOWER",
    "templates": "TEXT",
    "labels": "LABEL",
    "where": "CONDITION",
    "mix": "HOW",
    "rates": "PATTERN=X",
    "locking": "LETTERS",
    "unlock": "WHEN",
    "duration": "LENGTH",
    "warmup": "LENGTH",
    "cooldown": "LENGTH",
    "timescale": "LENGTH",
    "host": "ADDRESS",
    "token": "TOKEN",
    "endpoint": "URL",
    "tokenizer": "FILE",
}
"""What stands for a value in the help: by its type, and for those whose type says little by their name."""


FILES = ("json", "sheet", "report", "dropped")
"""Settings that name a file to write."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting as the command line has it."""

    name: str
    hint: Any
    default: Any
    help: str
    positional: bool
    repeated: bool
    metavar: str | None
    """What stands for the value, where the config says it."""

    @cached_property
    def kind(self) -> Any:
        """The type of a value, without None, and of one where several are taken."""
        hint = self.hint
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(one for one in get_args(hint) if one is not type(None))
        return get_args(hint)[0] if self.several else hint

    @property
    def several(self) -> bool:
        """Whether it takes any number of values."""
        return get_origin(self.hint) is tuple

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def words(self) -> str:
        """How it is written: --its-name, or the placeholder of a positional one."""
        if self.positional:
            return (self.metavar or self.name.upper()).strip("[].")
        return "--" + self.name.replace("_", "-")

    @property
    def placeholder(self) -> str | None:
        """What stands for its value in the help; None where tyro's own says it: the choices of a Literal."""
        if self.positional:
            return self.metavar if self.required else f"[{self.metavar}]"
        if self.kind not in PLACEHOLDERS:
            return None
        shown = NAMED.get(self.name, PLACEHOLDERS[self.kind])
        return shown + ("..." if self.several and not self.repeated else "")

    @property
    def hint_of_default(self) -> str | None:
        """What the help says behind the text; None where nothing has to be said, tyro's own where it must be given."""
        if self.required:
            return "(required)" if self.positional else None
        if self.repeated:
            return "(repeatable)"
        if self.default is False or self.default in (None, (), ""):
            return ""
        shown = "yes" if self.default is True else " ".join(map(str, self.default)) if self.several else self.default
        return f"(default: {shown})"

    def problem(self, value: str) -> str | None:
        """What is wrong with this value; None where nothing is."""
        if value != value.encode(errors="ignore").decode():
            return "it is not UTF-8: rename what it names"
        if self.kind is Path and not value:
            return "it must be a path"
        if self.name in FILES and Path(value).is_dir():
            return "it is a folder, it must be a file"
        if get_origin(self.kind) is Literal:
            choices = get_args(self.kind)
            if value not in choices:
                close = nearest(value, choices, 1)
                also = f" ({close})" if close.startswith("perhaps") else ""
                return f"it must be one of {', '.join(choices)}{also}"
        elif self.kind in (int, float):
            try:
                self.kind(value)
            except ValueError:
                return "it must be a whole number" if self.kind is int else "it must be a number"
        return None


def options_of(config: type[Any]) -> list[Option]:
    """All settings of a config, in its order."""
    hints = get_type_hints(config, include_extras=True)
    plain = get_type_hints(config)
    helps = {
        one.arg_name: " ".join((one.description or "").split())
        for kind in reversed(config.__mro__[:-1])
        for one in docstring_parser.parse_from_object(kind).params
    }
    found = []
    for field in dataclasses.fields(config):
        markers = [*getattr(hints[field.name], "__metadata__", ())]
        found.append(
            Option(
                field.name,
                plain[field.name],
                field.default,
                helps.get(field.name, ""),
                tyro.conf.Positional in markers,
                tyro.conf.UseAppendAction in markers,
                next((one.metavar for one in markers if getattr(one, "metavar", None)), None),
            )
        )
    return found


def form_of(config: type[Any]) -> type[Any]:
    """A dataclass with the settings of a config as tyro is to show them; groups of options are fields of their own."""
    groups, names = {"": []}, GROUPS.get(config, {})  # type: ignore[var-annotated]
    group = ""
    for option in options_of(config):
        group = names.get(option.name, group)
        # What must be given stands first.
        groups.setdefault("" if option.required else group, []).append(field_of(option))
    fields: list[Any] = groups.pop("")
    for name, members in groups.items():
        kind = dataclasses.make_dataclass(name.title(), members, kw_only=True)
        fields.append((f"{kind.__name__}Group", Annotated[kind, tyro.conf.arg(name=name)]))
    return dataclasses.make_dataclass(config.__name__, fields, kw_only=True)


def field_of(option: Option) -> tuple[Any, ...]:
    """A field of a form: name, annotation and, where there is one, the default."""
    shown = tyro.conf.arg(help=option.help, metavar=option.placeholder, help_behavior_hint=option.hint_of_default)
    wanted = (
        (tyro.conf.Positional, option.positional),
        (tyro.conf.UseAppendAction, option.repeated),
        (tyro.conf.FlagCreatePairsOff, option.default is False),
    )
    hint: Any = Annotated[option.hint, shown]
    for marker, there in wanted:
        hint = Annotated[hint, marker] if there else hint
    return (option.name, hint) if option.required else (option.name, hint, dataclasses.field(default=option.default))


def filled(config: type[Any], form: Any) -> Any:
    """The config that a filled form stands for."""

    def values(part: Any) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                yield from values(value)
            else:
                yield field.name, value

    return config(**dict(values(form)))
