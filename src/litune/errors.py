"""Everything that litune raises on purpose.

    LituneError                 the root; the command line prints it as one line and exits with 2
    ├── ConfigError             a setting is wrong or contradicts another
    ├── DataError               pairs, tables, images or captions can't be used
    ├── TowerError              a tower is unknown, incomplete or can't be loaded
    ├── StoreError              a feature store is missing, incomplete or of another tower
    ├── RunError                a run folder is missing, incomplete or of another version
    ├── ExportError             a run can't be expressed by the target of an export
    ├── OutputExistsError       the output is there already and overwriting was not asked for
    ├── OutputBusyError         another process is writing the output
    └── MissingExtraError       an optional package is not installed

A message has the value, the rule and the remedy, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LituneError(Exception):
    """The root of litune's errors."""


class ConfigError(LituneError):
    """A setting is wrong or contradicts another."""


class DataError(LituneError):
    """Pairs, tables, images or captions can't be used."""


class TowerError(LituneError):
    """A tower is unknown, incomplete or can't be loaded."""


class StoreError(LituneError):
    """A feature store is missing, incomplete or of another tower."""


class RunError(LituneError):
    """A run folder is missing, incomplete or of another version."""


class ExportError(LituneError):
    """A run can't be expressed by the target of an export."""


class OutputExistsError(LituneError):
    """The output is there already and overwriting was not asked for."""


class OutputBusyError(LituneError):
    """Another process is writing the output."""


class MissingExtraError(LituneError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed: run  pip install 'litune[{extra}]'"
        )


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A clause that names the known names nearest to `name`, for the end of a message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "perhaps you meant " + " or ".join(repr(c) for c in close)
    shown = ", ".join(sorted(known)[:12])
    return f"known: {shown}" + (", …" if len(known) > 12 else "")
