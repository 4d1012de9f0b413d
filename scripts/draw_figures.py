"""Draw the figures of docs/method.md as SVG files; with --check nothing is written and a difference exits with 1.

Plain SVG out of a few functions, so that a changed figure is a readable diff.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "figures"

INK, MUTED, LINE, GROUND = "#1f2d30", "#5b6b6f", "#b8c4c6", "#fbfcfc"
LOCKED, TUNED, SCRATCH, STORE = "#dbe4ee", "#cdeee6", "#fff0c9", "#eceff0"
LOCKED_EDGE, TUNED_EDGE, SCRATCH_EDGE = "#56789c", "#0f8a73", "#c08a00"
EDGES = {LOCKED: LOCKED_EDGE, TUNED: TUNED_EDGE, SCRATCH: SCRATCH_EDGE}
RED, BLUE, GREEN = "#d6453d", "#3d6fd6", "#3aa655"


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole SVG file of these parts; `title` is what is read aloud in its place."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="system-ui, sans-serif" font-size="14" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{MUTED}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(
    x: float, y: float, words: str, *, size: int = 14, color: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    """Words with their baseline at y."""
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{color}"{weight}>{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, fill: str, *, edge: str = "none", line: float = 1) -> str:
    """A plain rectangle."""
    size = f'x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}"'
    return f'<rect {size} fill="{fill}" stroke="{edge}" stroke-width="{line:g}"/>'


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    """A box with centred lines of text, the first one bold."""
    middle = y + height / 2 + 5 - 9 * (len(lines) - 1)
    inside = [
        text(
            x + width / 2, middle + 18 * i, line, bold=i == 0, size=14 if i == 0 else 12, color=INK if i == 0 else MUTED
        )
        for i, line in enumerate(lines)
    ]
    edge = EDGES.get(fill, LINE)
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{edge}"/>'
    return "\n".join([shape, *inside])


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through the points with a tip at the last."""
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{way}" fill="none" stroke="{MUTED}" stroke-width="1.5"{dash} marker-end="url(#tip)"/>'


def padlock(x: float, y: float, color: str = LOCKED_EDGE) -> str:
    """A closed padlock, 14 wide, its top left corner at (x, y)."""
    return (
        f'<rect x="{x:g}" y="{y + 7:g}" width="14" height="10" rx="2" fill="{color}"/>'
        f'<path d="M{x + 3:g} {y + 7:g}v-2.5a4 4 0 0 1 8 0v2.5" fill="none" stroke="{color}" stroke-width="2"/>'
    )


def way() -> str:
    """Images pass the locked tower once; tuning reads the store as often as it likes."""
    parts = [
        box(20, 40, 110, 50, STORE, "images"),
        box(20, 165, 110, 50, STORE, "captions"),
        box(190, 33, 150, 64, LOCKED, "image tower", "locked"),
        padlock(318, 40),
        box(400, 33, 150, 64, STORE, "feature store", "on disk"),
        box(400, 158, 150, 64, TUNED, "text tower", "tuned"),
        box(630, 95, 130, 64, STORE, "loss", "which is whose?"),
        arrow((130, 65), (188, 65)),
        arrow((340, 65), (398, 65)),
        text(265, 122, "litune embed: once, ever", size=12, color=MUTED),
        arrow((550, 65), (695, 65), (695, 93)),
        arrow((130, 190), (398, 190)),
        arrow((550, 182), (680, 182), (680, 161)),
        arrow((710, 161), (710, 206), (552, 206), dashed=True),
        text(632, 225, "gradient", size=12, color=MUTED),
        text(632, 50, "read, every step", size=12, color=MUTED),
        text(475, 252, "litune tune: many steps, epochs, variants", size=12, color=MUTED),
    ]
    return page(780, 270, "Images pass the locked tower once, into a feature store; tuning reads the store", parts)


SHAPES = ((RED, "disc"), (BLUE, "square"), (GREEN, "triangle"), (RED, "disc"), (BLUE, "triangle"))
CAPTIONS = ("a red disc", "a blue square", "a green triangle", "a red disc", "a blue triangle")


def picture(x: float, y: float, color: str, shape: str) -> str:
    """A small picture of a shape around (x, y)."""
    frame = f'<rect x="{x - 18}" y="{y - 18}" width="36" height="36" rx="4" fill="white" stroke="{LINE}"/>'
    inside = {
        "disc": f'<circle cx="{x}" cy="{y}" r="11" fill="{color}"/>',
        "square": f'<rect x="{x - 10}" y="{y - 10}" width="20" height="20" fill="{color}"/>',
        "triangle": f'<path d="M{x} {y - 12}l12 21h-24z" fill="{color}"/>',
    }[shape]
    return frame + inside


def loss() -> str:
    """The scores of a batch: every image with every text."""
    side, left, top = 56, 190, 110
    parts = [text(left + side * 2.5, 28, "texts of the batch", bold=True), text(80, 260, "images", bold=True)]
    for j, caption in enumerate(CAPTIONS):
        x = left + side * j + side / 2
        parts.append(
            f'<g transform="rotate(-24 {x:g} {top - 10})">{text(x, top - 10, caption, size=12, anchor="start")}</g>'
        )
    for i, (color, shape) in enumerate(SHAPES):
        parts.append(picture(left - 34, top + side * i + side // 2, color, shape))
        for j, caption in enumerate(CAPTIONS):
            own, same = i == j, CAPTIONS[i] == caption
            fill = TUNED if own else STORE if same else "white"
            x, y = left + side * j, top + side * i
            parts.append(bar(x, y, side, side, fill, edge=LINE))
            mark, tone = ("pair", TUNED_EDGE) if own else ("left out", MUTED) if same else ("−", MUTED)
            parts.append(text(x + side / 2, y + side / 2 + 5, mark, size=13 if own else 11, color=tone, bold=own))
    right, bottom = left + side * 5, top + side * 5
    parts += [
        bar(left, top + side, side * 5, side, "none", edge=LOCKED_EDGE, line=2.5),
        arrow((right + 34, top + side * 1.5), (right + 4, top + side * 1.5)),
        text(right + 40, top + side * 1.5 - 6, "image → text:", anchor="start", bold=True),
        text(right + 40, top + side * 1.5 + 12, "which of these texts", size=12, color=MUTED, anchor="start"),
        text(right + 40, top + side * 1.5 + 28, "is this image's?", size=12, color=MUTED, anchor="start"),
        bar(left + side * 4, top, side, side * 5, "none", edge=SCRATCH_EDGE, line=2.5),
        arrow((left + side * 4.5, bottom + 32), (left + side * 4.5, bottom + 4)),
        text(
            left + side * 4.5, bottom + 48, "text → image: which of these images is this text's?", size=12, color=MUTED
        ),
    ]
    return page(
        680, 460, "The matrix of scores: pairs on the diagonal, all else negatives, equal captions left out", parts
    )


SETTINGS = (
    ("LU", LOCKED, TUNED, "LiT, text tower", "from pre-trained weights"),
    ("Lu", LOCKED, SCRATCH, "LiT, text tower", "from scratch"),
    ("LL", LOCKED, LOCKED, "only a head", "is tuned"),
    ("UU", TUNED, TUNED, "both go on", "from pre-trained weights"),
    ("Uu", TUNED, SCRATCH, "image tower goes on,", "text from scratch"),
    ("uu", SCRATCH, SCRATCH, "as CLIP and ALIGN:", "both from scratch"),
)


def locking() -> str:
    """The settings of the two letters."""
    kinds = {LOCKED: "locked", TUNED: "pre-trained", SCRATCH: "from scratch"}
    parts = []
    for i, (letters, image, words, *about) in enumerate(SETTINGS):
        x, y = 20 + 250 * (i % 3), 20 + 190 * (i // 3)
        parts += [
            text(x + 115, y + 22, letters, size=20, bold=True),
            box(x + 5, y + 38, 105, 62, image, "image", kinds[image]),
            box(x + 120, y + 38, 105, 62, words, "text", kinds[words]),
            text(x + 115, y + 122, about[0], size=12, color=MUTED),
            text(x + 115, y + 138, about[1], size=12, color=MUTED),
        ]
        parts += [padlock(x + at, y + 43) for at, kind in ((91, image), (206, words)) if kind == LOCKED]
        if image == LOCKED:
            parts.append(text(x + 115, y + 156, "reads stored features", size=12, color=TUNED_EDGE, bold=True))
    return page(770, 380, "Locking settings: two letters, the image tower's first", parts)


# Published with the method (arXiv 2111.07991): images a second and core, with stored features and running the tower.
PUBLISHED = {"B/32": (2439, 893), "L/16": (2423, 215), "g/14": (2409, 17)}
# Width, depth, width of the MLP, and tokens of a picture of 224 × 224 pixels with the class token.
IMAGE_TOWERS = {"B/32": (768, 12, 3072, 50), "L/16": (1024, 24, 4096, 197), "g/14": (1408, 40, 6144, 257)}
TEXT_TOWER = (768, 12, 3072, 16)


def products(width: int, depth: int, mlp: int, tokens: int) -> float:
    """Billions of multiply-adds in a transformer's forward pass: its linear layers and its attention.

    >>> round(products(768, 12, 3072, 197), 1)  # ViT-B/16
    17.4
    """
    linear = tokens * (4 * width**2 + 2 * width * mlp)
    attention = 2 * tokens**2 * width
    return depth * (linear + attention) / 1e9


def cost() -> str:
    """What a pair costs in a step, with stored features and with the tower run again."""
    texts = 3 * products(*TEXT_TOWER)  # forward, and twice as much backward
    left, scale = 90, 1.55
    parts = [
        text(left, 34, "multiply–adds per pair and step, in billions", anchor="start", bold=True),
        text(690, 24, "published speed,", size=12, color=MUTED),
        text(690, 40, "images/s and core", size=12, color=MUTED),
    ]
    for i, (name, shape) in enumerate(IMAGE_TOWERS.items()):
        y, image = 62 + 84 * i, products(*shape)
        stored, run = PUBLISHED[name]
        parts += [
            text(left - 12, y + 34, name, anchor="end", bold=True),
            bar(left, y, scale * texts, 24, TUNED_EDGE),
            text(left + scale * texts + 8, y + 17, f"{texts:.1f}   stored features", size=12, anchor="start"),
            text(690, y + 17, f"{stored:,}", size=13),
            bar(left, y + 30, scale * texts, 24, TUNED_EDGE),
            bar(left + scale * texts, y + 30, scale * image, 24, LOCKED_EDGE),
            text(left + scale * (texts + image) + 8, y + 47, f"{texts + image:.1f}", size=12, anchor="start"),
            text(690, y + 47, f"{run:,}", size=13),
        ]
    parts += [
        bar(left, 318, 12, 12, TUNED_EDGE),
        text(left + 18, 329, "text tower, forward and backward", size=12, color=MUTED, anchor="start"),
        bar(left + 230, 318, 12, 12, LOCKED_EDGE),
        text(
            left + 248, 329, "locked image tower, forward, if run in every step", size=12, color=MUTED, anchor="start"
        ),
    ]
    return page(770, 348, "Cost of a pair in a tuning step, with stored features and with the image tower run", parts)


FIGURES = {"way": way, "loss": loss, "locking": locking, "cost": cost}


def write(check: bool) -> int:
    """Write the figures, or say which would change."""
    changed = []
    for name, draw in FIGURES.items():
        file, drawn = FOLDER / f"{name}.svg", draw()
        if not file.exists() or file.read_text(encoding="utf-8") != drawn:
            changed.append(name)
            if not check:
                FOLDER.mkdir(exist_ok=True)
                file.write_text(drawn, encoding="utf-8")
    for name in changed:
        print(f"docs/figures/{name}.svg {'is out of date: run scripts/draw_figures.py' if check else 'written'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(write("--check" in sys.argv[1:]))
