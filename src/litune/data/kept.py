"""Kept pairs as a table that `read_pairs` reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from litune.data.pairs import find_images
from litune.errors import ConfigError, OutputExistsError
from litune.files import atomic

TABLES = (".parquet", ".jsonl", ".csv")


def check_table(file: Path, option: str, overwrite: bool) -> None:
    """Raise unless a table can be written to `file`."""
    if file.suffix.lower() not in TABLES:
        raise ConfigError(f"{option} {file}: name a file that ends with {', '.join(TABLES)}")
    if file.is_dir() or (file.exists() and not overwrite):
        raise OutputExistsError(f"{file} exists: choose another {option}, or give --overwrite")
