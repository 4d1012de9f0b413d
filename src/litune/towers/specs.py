"""Options that the specs of image towers share, and one-line reasons why a tower can't be loaded."""

from __future__ import annotations

from litune.errors import TowerError, nearest


def no_more(spec: str, options: dict[str, str], known: list[str]) -> None:
    """Raise `TowerError` for an option that is left over, naming the nearest known ones."""
    for name in options:
        raise TowerError(f"{spec!r} has the unknown option {name!r} ({nearest(name, known)})")


def random_asked(spec: str, options: dict[str, str]) -> bool:
    """Pop `init` from the options; returns whether it is random."""
    init = options.pop("init", None)
    if init not in (None, "random"):
        raise TowerError(f"{spec!r} has init={init}: only init=random is known")
    return init == "random"


def size_asked(spec: str, options: dict[str, str]) -> tuple[int, int] | None:
    """Pop `size` from the options; returns height and width, None if absent."""
    try:
        return parse_size(options.pop("size")) if "size" in options else None
    except ValueError as why:
        raise TowerError(f"{spec!r} has a size that can't be read: {why}") from None


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `96` or `96,128`, in pixels."""
    numbers = [int(v) for v in text.split(",")]
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{text} is not one or two numbers of pixels")
    return numbers[0], numbers[-1]


def reason(what: str, why: Exception) -> str:
    """One line: what failed, why, and a remedy if a missing network may be the cause."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    text = lines[0] if lines else type(why).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    offline = any(word in f"{type(why).__name__} {why}".lower() for word in ("connect", "offline", "resolve", "hub"))
    hint = "; without a connection to the hub, give a local folder or checkpoint" if offline else ""
    return f"{what}: {text[:300]}{hint}"
