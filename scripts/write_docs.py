"""Write what is generated: the command-line reference, and the list of options that the tests compare.

Run from the repository's root; with --check nothing is written and a difference exits with 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from litune.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
OPTIONS = ROOT / "tests" / "cli_options.txt"


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
        found = re.findall(r"^  (--[a-z0-9-]+|[A-Z]+(?= |$))", help_text(*name.split()), re.MULTILINE)
        lines += [f"{name} {option}" for option in found]
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


def write(check: bool) -> int:
    """Write both files, or say which would change."""
    changed = []
    for file, text in ((REFERENCE, reference()), (OPTIONS, options())):
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            changed.append(file.relative_to(ROOT))
            if not check:
                file.write_text(text, encoding="utf-8")
    for file in changed:
        print(f"{file} {'is out of date: run scripts/write_docs.py' if check else 'written'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(write("--check" in sys.argv[1:]))
