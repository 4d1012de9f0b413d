"""Write what is generated: the references of the commands and of Python, and the options that the tests compare.

Run from the repository's root; with --check nothing is written and a difference exits with 1.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litune
from litune.cli import COMMANDS, main
from litune.config import Command

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
API = ROOT / "docs" / "api.md"
OPTIONS = ROOT / "tests" / "cli_options.txt"

# The page of the public names, by what they are for; and what they take and give without being public names themselves.
API_PARTS = {
    "Models": ("load", "LiT", "ZeroShot"),
    "Features": ("FeatureStore", "Selection", "ImageTower", "ImageTransform"),
    "Losses": ("softmax_loss", "sigmoid_loss", "Ids", "MoreImages"),
}
NOT_PUBLIC = {
    "ZeroShot": "litune.model.lit",
    "Selection": "litune.store.selection",
    "Ids": "litune.tuning.losses",
    "MoreImages": "litune.tuning.losses",
}


def help_text(*command: str) -> str:
    """What `litune COMMAND --help` prints, 80 columns wide, without colors."""
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return "\n".join(line.rstrip() for line in plain.strip().splitlines()) + "\n"


def options() -> str:
    """Every command's options, one per line."""
    lines = []
    for name in COMMANDS:
        page = help_text(*name.split())
        for found in re.findall(r"^  (--[a-z0-9-]+(?:, --[a-z0-9-]+)*|\[?[A-Z]+(?=[ .\]]|$))", page, re.MULTILINE):
            lines += [f"{name} {option.strip('[')}" for option in found.split(", ")]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The reference of all commands, as Markdown."""
    parts = [
        "# Commands\n",
        "Written by `scripts/write_docs.py` from the configs in `src/litune/config.py`. Each command is also a Python",
        "function of the same name with the same settings: `litune embed PAIRS --image-tower X --out S` is",
        '`litune.embed("PAIRS", image_tower="X", out="S")`; of `litune data filter` it is `litune.filter_data`.\n',
    ]
    for name in COMMANDS:
        parts += [f"## litune {name}\n", "```text", help_text(*name.split()).rstrip(), "```\n"]
    return "\n".join(parts)


def api() -> str:
    """The reference of the public Python names, as Markdown."""
    public = {name: getattr(litune, name) for name in litune.__all__ if name != "__version__"}
    commands = {name: found for name, found in public.items() if isinstance(found, Command)}
    parts = [
        "# Python\n",
        "Written by `scripts/write_docs.py` from signatures and docstrings. `import litune` is quick: what is behind a",
        "name is imported at its first use. Shapes: B images in a batch, N texts, D shared dimension, C classes. A",
        "quick tour is on [its own page](python.md).\n",
        "## Commands\n",
        "Each takes the settings of its [command line](reference.md) as arguments, `-` written as `_`, strings where",
        "paths are expected.\n",
    ]
    for name, found in commands.items():
        parts += [*heading(f"litune.{name}", command_signature(found)), docstring(found), ""]
    listed = [name for names in API_PARTS.values() for name in names]
    rest = sorted(set(public) - set(commands) - set(listed) - {"LituneError"})
    for title, names in (API_PARTS | ({"More": tuple(rest)} if rest else {})).items():
        parts += [f"## {title}\n"]
        for name in names:
            module = NOT_PUBLIC.get(name)
            found = getattr(importlib.import_module(module), name) if module else public[name]
            shown = f"{module or 'litune'}.{name}"
            parts += [*heading(shown, signature(found)), docstring(found), ""]
            parts += members(found) if inspect.isclass(found) else []
    parts += ["## Errors\n", docstring(importlib.import_module("litune.errors")), ""]
    return "\n".join(parts)


def heading(name: str, call: str) -> list[str]:
    """A name's heading, and how it is called."""
    return [f"### {name}\n", "```text", f"{name}{call}", "```\n"]


def command_signature(found: Command[..., Any, Any]) -> str:
    """A command's arguments: those that must be given, those that only Python has, and what comes back."""
    needed = [p.name for p in found.__signature__.parameters.values() if p.default is p.empty]
    run = inspect.signature(found.run)
    more = [f"{p.name}={p.default!r}" for p in list(run.parameters.values())[1:]]
    return f"({', '.join([*needed, *more, '…'])}) → {annotation(run.return_annotation)}"


def signature(found: Any) -> str:
    """The arguments and the result of a function, or of a class's constructor; one a line where they are long."""
    call = inspect.signature(found)
    arguments, keyword_only = [], False
    for p in call.parameters.values():
        if p.name == "self":
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            arguments, keyword_only = [*arguments, "*"], True
        typed = p.name if p.annotation is p.empty else f"{p.name}: {annotation(p.annotation)}"
        default = "" if p.default is p.empty else f" = {p.default!r}" if typed != p.name else f"={p.default!r}"
        arguments.append(typed + default)
    back = call.return_annotation
    returned = "" if inspect.isclass(found) or back in (call.empty, None, "None") else f" → {annotation(back)}"
    line = f"({', '.join(arguments)}){returned}"
    return line if len(line) < 80 else "(\n" + "".join(f"    {a},\n" for a in arguments) + f"){returned}"


def annotation(of: Any) -> str:
    """A type as its source has it."""
    return of if isinstance(of, str) else inspect.formatannotation(of)


def docstring(of: Any) -> str:
    """A docstring as Markdown: its tree of errors, and whatever else is indented, as text."""
    return re.sub(
        r"(?m)((?:^ {4}.*\n?(?:\n(?= {4}))?)+)",
        lambda block: f"```text\n{inspect.cleandoc(block[0])}\n```\n",
        inspect.getdoc(of) or "",
    ).rstrip()


def members(kind: type[Any]) -> Iterator[str]:
    """The public methods and properties that a class itself has, those with a docstring."""
    for name, member in vars(kind).items():
        read_only = isinstance(member, property) or type(member).__name__ == "cached_property"
        function = getattr(member, "__func__", member)
        if (
            (name.startswith("_") and name != "__call__")
            or not (read_only or inspect.isfunction(function))
            or not inspect.getdoc(member)
        ):
            continue
        shown = name if read_only else f"{name}{signature(function)}"
        yield f"```text\n{kind.__name__}.{shown}\n```\n\n{docstring(member)}\n"


def write(check: bool) -> int:
    """Write the files, or say which would change."""
    changed = []
    for file, text in ((REFERENCE, reference()), (API, api()), (OPTIONS, options())):
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            changed.append(file.relative_to(ROOT))
            if not check:
                file.write_text(text, encoding="utf-8")
    for file in changed:
        print(f"{file} {'is out of date: run scripts/write_docs.py' if check else 'written'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(write("--check" in sys.argv[1:]))
