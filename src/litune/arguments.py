"""argv → config: the commands' pages of help, and one line that says what can't be read.

tyro parses and prints; what it would refuse, or take for something else, `check` says before. Nothing here imports
torch.
"""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tyro

from litune.errors import ConfigError, nearest
from litune.options import Option, filled, form_of, options_of

EXAMPLES = {
    "quickstart": "litune quickstart",
    "embed": "litune embed my-photos/ --image-tower efficientnet-lite0 --out my-features",
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


def read(name: str, config: type[Any], arguments: Sequence[str]) -> Any:
    """The config that the arguments of a command ask for; prints its help and exits where that is asked for.

    Raises `ConfigError` with what can't be read.
    """
    if {"-h", "--help"} & set(arguments):
        print(describe(name, config), end="\n\n")
    else:
        check(name, config, arguments)
    form = tyro.cli(
        form_of(config),
        prog=f"litune {name}",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    return filled(config, form)


def check(name: str, config: type[Any], arguments: Sequence[str]) -> None:
    """Raise `ConfigError` with what is wrong with a command's arguments, where something is."""
    options = options_of(config)
    given = set()
    for option, values in assigned(name, options, arguments):
        if option.name in given and option.several and not option.repeated:
            raise ConfigError(f"{option.words} is given twice: put all its values behind one {option.words}")
        given.add(option.name)
        for value in values:
            if wrong := option.problem(value):
                raise ConfigError(f"{option.words} is {value!r}, {wrong}")
    missing = [option.words for option in options if option.required and option.name not in given]
    if missing:
        raise ConfigError(f"litune {name} needs {listed(missing)}, as in: {EXAMPLES[name]}")


def assigned(name: str, options: Sequence[Option], arguments: Sequence[str]) -> Iterator[tuple[Option, Sequence[str]]]:
    """The options that a command's arguments name, with their values. Raises `ConfigError` for what is no option."""
    known = {option.words: option for option in options if not option.positional}
    known |= {f"--no-{words[2:]}": option for words, option in known.items() if option.default is True}
    places = [option for option in options if option.positional]
    words, place, only_places = list(arguments), 0, False
    while words:
        word = words.pop(0)
        if word == "--" and not only_places:
            only_places = True
            continue
        if only_places or not is_option(word):
            if place == len(places):
                taken = listed([option.words for option in places]) or "no arguments"
                how = ": give them one after the other" if places and places[-1].several else ""
                raise ConfigError(f"litune {name} takes {taken}, {word!r} is one too many{how}")
            following = words if only_places else list(itertools.takewhile(lambda one: not is_option(one), words))
            following = following if places[place].several else []
            words = words[len(following) :]
            yield places[place], [word, *following]
            place += 1
            continue
        written, equals, value = word.partition("=")
        option = known.get(written.replace("_", "-"))
        if option is None:
            close = nearest(written, known, 2)
            raise ConfigError(f"litune {name} has no option {written} ({close}): see litune {name} --help")
        if option.kind is bool:
            if equals:
                raise ConfigError(f"{written} is a switch: write it without {equals}{value}")
            yield option, []
            continue
        most = 0 if equals else 1
        if option.several and not option.repeated:  # the last words are left to what must be given
            most = max(0, len(words) - sum(one.required and not one.several for one in places[place:]))
        following = list(itertools.takewhile(lambda one: not is_option(one), words))[:most]
        values = [value, *following] if equals else following
        if not values:
            raise ConfigError(f"{written} needs a value: see litune {name} --help")
        words = words[len(following) :]
        yield option, values


def listed(words: Sequence[str]) -> str:
    """Some words as a clause: A, B and C."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def is_option(word: str) -> bool:
    """Whether a word of the command line is the name of an option; -0.5 and - are values."""
    return re.match(r"--?[A-Za-z]|--$", word) is not None


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
    found = {
        name.removeprefix(start): first_sentence(config)
        for name, config in commands.items()
        if name.startswith(start) and " " not in name.removeprefix(start)
    }
    return found if group else found | dict(groups)


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
    return f"{wrapped(inspect.getdoc(config) or '')}\n\nExample:\n  {EXAMPLES[name]}"


def wrapped(text: str) -> str:
    """Paragraphs as wide as the terminal, or somewhat less."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), columns()) for part in text.split("\n\n"))


def columns() -> int:
    """How wide running text is."""
    return min(WIDEST, shutil.get_terminal_size().columns)
