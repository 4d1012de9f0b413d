"""The options that both benchmarks have. Imports nothing large: see tune_memory.py."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-tower", default="minilm", help="minilm, or hf:FOLDER of another BERT")
    parser.add_argument("--dim", type=int, default=1280, help="the width of the stored features")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--captions", type=Path, help="a table of captions; by default the emoji's names")
    parser.add_argument("--split", action="append", default=[], help="only these splits of --captions")
    parser.add_argument("--lang", action="append", default=[], help="only these languages of --captions")
    parser.add_argument("--threads", type=int, help="torch's threads; by default as many as torch takes")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
