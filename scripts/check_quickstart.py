"""Check what a quickstart run wrote: its files, and that the figures are those of a tuned model.

Usage: python scripts/check_quickstart.py litune-quickstart/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST = 0.60  # held-out text→image R@10
MOST_SECONDS = 300.0


def check(file: Path) -> list[str]:
    """What is wrong with a quickstart's results, as lines."""
    results = json.loads(file.read_text(encoding="utf-8"))
    wrong = []
    found = results["retrieval"]
    recall, chance = found["text_to_image"]["recall@10"], found["chance"]["text_to_image"]["recall@10"]
    if (found["images"], found["captions"]) != (300, 300):
        wrong.append(f"{found['images']} images and {found['captions']} captions were held out, expected 300")
    if recall < LEAST:
        wrong.append(f"text→image R@10 is {recall:.1%} (chance {chance:.1%}), at least {LEAST:.0%} was expected")
    for name in ("gallery.png", "gallery.html", "run/manifest.json", "features/store.json", "emoji/captions.csv"):
        if not (file.parent / name).is_file():
            wrong.append(f"{file.parent / name} is missing")
    print(f"quickstart: R@10 {recall:.1%}, {results['seconds']:.0f} s")
    if results["seconds"] > MOST_SECONDS:
        print(f"note: slower than {MOST_SECONDS:.0f} s; the machine may be shared")
    return wrong


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]))
    print("\n".join(problems))
    sys.exit(1 if problems else 0)
