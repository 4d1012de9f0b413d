"""argv → config: argparse made out of a config's settings, the pages of help, and one line for what can't be read.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litune.config import DedupConfig, EmbedConfig, EvalConfig, FilterConfig, TuneConfig
from litune.errors import ConfigError, nearest
from litune.settings import Setting, settings_of

EXAMPLES = {
    "quickstart": "litune quickstart",
    "embed": "litune embed my-photos/ --image-tower efficientnet-lite0 --out my-features",
    "fit": "litune fit my-features --text-tower minilm --out my-run",
    "tune": "litune tune my-features --text-tower minilm --out my-run",
    "eval": "litune eval my-run --store my-features --split val",
    "compare": "litune compare table.toml --out my-table",
    "classify": "litune classify my-run photo.jpg --labels wombat jaguar",
    "search": 'litune search my-run my-features "a red flask on a desk"',
    "serve": "litune serve my-run --images my-features",
    "inspect": "litune inspect efficientnet-lite0 --text-tower minilm --images 10000",
    "probe": "litune probe my-features other-features",
    "import": "litune import LiT-B16B.npz --vocab LiT-B16B.txt --out lit-b16b",
    "export": "litune export my-run --to onnx",
    "push": "litune push my-run me/my-run --private",
    "data inspect": "litune data inspect my-photos/ --out my-overview",
    "data fetch": "litune data fetch urls.parquet --out my-shards",
    "data filter": "litune data filter captions.csv --min-words 3 --out kept.csv",
    "data dedup": "litune data dedup my-features --against test-features --out my-dedup",
}
"""One command line of each, which its page of help begins with."""

WIDEST = 100
"""The most columns of running text."""

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


def read(name: str, config: type[Any], arguments: Sequence[str]) -> Any:
    """The config that the arguments of a command ask for; prints its help and exits where that is asked for.

    Raises `ConfigError` with what can't be read.
    """
    settings = settings_of(config)
    parser = parser_of(name, config)
    words = [re.sub(r"^--[a-z_]+", lambda option: option[0].replace("_", "-"), word) for word in arguments]
    try:
        parsed, surplus = parser.parse_known_intermixed_args(words)
    except argparse.ArgumentError as why:
        raise ConfigError(mistake(name, why.argument_name or "", words)) from None
    if surplus:
        raise ConfigError(unknown(name, settings, surplus))
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parsed).items()}
    given = {key: value for key, value in given.items() if value not in (None, ())}
    missing = [setting.words for setting in settings if setting.required and setting.name not in given]
    if missing:
        raise ConfigError(f"litune {name} needs {listed(missing)}, as in: {EXAMPLES[name]}")
    return config(**given)


def parser_of(name: str, config: type[Any]) -> argparse.ArgumentParser:
    """The parser of a command's arguments: it leaves out what is not given, and refuses nothing for being left out."""
    settings, helps = settings_of(config), docs_of(config)
    places = [placeholder(setting) for setting in settings if setting.place]
    parser = argparse.ArgumentParser(
        prog=f"litune {name}",
        usage=" ".join(["%(prog)s [-h] [OPTIONS]", *places]),
        description=describe(name, config),
        formatter_class=Page,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = re.compile("-[^A-Za-z-]")  # -1e-5 is a value as well
    groups: dict[str, Any] = {"": parser}
    group = ""
    for setting in settings:
        group = GROUPS.get(config, {}).get(setting.name, group)
        if group not in groups:
            groups[group] = parser.add_argument_group(f"{group} options")
        # What must be given stands first.
        text = f"{helps[setting.name]} {note(setting)}".strip().replace("%", "%%")
        groups["" if setting.required else group].add_argument(*names(setting), help=text, **how(setting))
    return parser


def names(setting: Setting) -> list[str]:
    """The names of a setting's argument: without dashes, where it is told by its place."""
    return [setting.name] if setting.place else [setting.words]


def how(setting: Setting) -> dict[str, Any]:
    """How argparse is to take a setting's values."""
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction if setting.default else "store_true"}
    taken = {"type": setting.parse, "metavar": placeholder(setting)}
    if setting.place:  # None stands for what is not there: argparse would read another default as a word
        return taken | {"nargs": "*" if setting.several else "?", "default": None}
    if setting.repeated:
        return taken | {"action": "append"}
    return taken | ({"nargs": "+", "action": Several} if setting.several else {})


class Several(argparse.Action):
    """Takes all values of an option, which is given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keep the values; raises `ConfigError` where there are some already."""
        if hasattr(namespace, self.dest):
            raise ConfigError(f"{option_string} is given twice: put all its values behind one {option_string}")
        setattr(namespace, self.dest, values)


class Page(argparse.RawDescriptionHelpFormatter):
    """A page of help whose lines break at spaces alone."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def placeholder(setting: Setting) -> str:
    """What stands for a setting's value in the help."""
    if setting.place:
        return setting.place if setting.required else f"[{setting.place}]"
    if setting.choices:
        return "{" + ",".join(setting.choices) + "}"
    return NAMED.get(setting.name, PLACEHOLDERS[setting.kind])


def note(setting: Setting) -> str:
    """What the help says behind the text."""
    if setting.required:
        return "(required)"
    if setting.repeated:
        return "(repeatable)"
    if setting.default is False or setting.default in (None, (), ""):
        return ""
    if setting.default is True:
        return "(default: yes)"
    return f"(default: {' '.join(map(str, setting.default)) if setting.several else setting.default})"


def docs_of(config: type[Any]) -> dict[str, str]:
    """The docstrings of a config's fields, by name, with those that it inherits."""
    bodies = [ast.parse(inspect.getsource(kind)).body[0].body for kind in config.__mro__[:-1]]  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(doc.value.value.split())
        for body in reversed(bodies)
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
    }


def mistake(name: str, option: str, words: Sequence[str]) -> str:
    """What is wrong with an option that argparse refuses: a switch that has a value, or another that has none."""
    for word in words:
        written, equals, value = word.partition("=")
        if value and written in option.split("/"):
            return f"{written} is a switch: write it without {equals}{value}"
    return f"{option} needs a value: see litune {name} --help"


def unknown(name: str, settings: Sequence[Setting], surplus: Sequence[str]) -> str:
    """What is wrong with words that no argument takes: the first option that is none, or the first word too many."""
    options = [word.partition("=")[0] for word in surplus if re.match(r"--?[A-Za-z]", word)]
    if options:
        known = [setting.words for setting in settings if not setting.place]
        known += [f"--no-{setting.words[2:]}" for setting in settings if setting.default is True]
        return f"litune {name} has no option {options[0]} ({nearest(options[0], known, 2)}): see litune {name} --help"
    places = [setting for setting in settings if setting.place]
    taken = listed([setting.words for setting in places]) or "no arguments"
    return f"litune {name} takes {taken}, {surplus[0]!r} is one too many"


def listed(words: Sequence[str]) -> str:
    """Some words as a clause: A, B and C."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def find(argv: Sequence[str], commands: Mapping[str, type[Any]], groups: Mapping[str, str]) -> tuple[str, list[str]]:
    """The command that the first words name, and its arguments. Raises `ConfigError` where there is none."""
    group = argv[0] if argv[0] in groups else ""
    name = " ".join(argv[: 2 if group else 1])
    if name in commands:
        return name, list(argv[2 if group else 1 :])
    known = names_under(group, commands, groups)
    raise ConfigError(f"there is no command litune {name} ({nearest(name.split()[-1], known, 2)}): see litune --help")


def names_under(group: str, commands: Mapping[str, type[Any]], groups: Mapping[str, str]) -> dict[str, str]:
    """What can follow `litune`, or `litune GROUP`, with what each does in a sentence."""
    start = f"{group} " if group else ""
    commands_under = {
        name.removeprefix(start): first_sentence(config)
        for name, config in commands.items()
        if name.startswith(start) and " " not in name.removeprefix(start)
    }
    return commands_under if group else commands_under | dict(groups)


def first_sentence(config: type[Any]) -> str:
    """What a command does, in a sentence."""
    return (config.__doc__ or "").partition("\n")[0]


def listing(group: str, about: str, names: Mapping[str, str], examples: Sequence[str] = ()) -> str:
    """The page that lists commands: what `litune --help` and `litune GROUP --help` print."""
    prog = f"litune {group}".strip()
    widest = max(map(len, names))
    lines = [f"usage: {prog} COMMAND …", "", wrapped(about), ""]
    lines += [*(f"  {example}" for example in examples), ""] if examples else []
    for name, does in names.items():
        lines += textwrap.wrap(
            does, columns(), initial_indent=f"  {name:{widest}}  ", subsequent_indent=" " * (widest + 4)
        )
    return "\n".join([*lines, "", f"{prog} COMMAND --help says what a command does, with all its options."])


def describe(name: str, config: type[Any]) -> str:
    """What a command's page of help begins with: what it does, and an example."""
    return f"{wrapped(inspect.getdoc(config) or '')}\n\nExample:\n  {EXAMPLES[name]}".replace("%", "%%")


def wrapped(text: str) -> str:
    """Paragraphs as wide as the terminal, or somewhat less."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), columns()) for part in text.split("\n\n"))


def columns() -> int:
    """How wide running text is."""
    return min(WIDEST, shutil.get_terminal_size().columns)
