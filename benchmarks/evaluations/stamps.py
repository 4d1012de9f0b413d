"""A table of Tux Paint's stamps with their captions: `python stamps.py > stamps.csv`.

The stamps come with Debian's package `tuxpaint-stamps-default` (GPL-2): pictures, photographs cut out for the most
part, and beside each a text file, English in its first line, then `de.utf8=…`. Those of letters, numbers and other
symbols are left out. Columns: image, split, lang, caption.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

STAMPS = Path("/usr/share/tuxpaint/stamps")
LANGUAGES = ("de", "fr", "cs", "zh_cn")


def captions(file: Path) -> dict[str, str]:
    """Language → caption."""
    first, *lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"en": first.strip()}
    for line in lines:
        if (match := re.match(r"(\w+)\.utf8=(.+)", line)) and match[1] in LANGUAGES:
            found[match[1].removesuffix("_cn")] = match[2].strip()
    return {lang: caption for lang, caption in found.items() if caption}


def main() -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["image", "split", "lang", "caption"])
    for picture in sorted(STAMPS.rglob("*.png")):
        text = picture.with_suffix(".txt")
        if picture.relative_to(STAMPS).parts[0] == "symbols" or not text.is_file():
            continue
        for lang, caption in captions(text).items():
            out.writerow([picture, "val", lang, caption])


if __name__ == "__main__":
    main()
