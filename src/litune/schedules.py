"""Durations as a user writes them, the learning rate's schedule, and the late unlocking of an image tower.

Everything is a pure function of the step, so that a run can be gone on from any step. Steps count from 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from litune.errors import ConfigError

Unit = Literal["steps", "epochs", "pairs", "%"]
Decay = Literal["cosine", "constant", "rsqrt"]

UNITS: dict[str, Unit] = {
    "step": "steps",
    "steps": "steps",
    "ep": "epochs",
    "epoch": "epochs",
    "epochs": "epochs",
    "pair": "pairs",
    "pairs": "pairs",
    "%": "%",
}
MULTIPLES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<multiple>[kMB]?)\s*(?P<unit>[a-z]+|%)?")

RAMP_WIDTH = 0.02
"""Of an unlocking ramp's sigmoid, as a share of the run: it rises from 12% to 88% within four widths."""
LOCKED_BELOW = 1e-3
"""Smaller shares of a ramp are exactly zero, so that the tower counts as locked and its steps cost nothing."""


@dataclass(frozen=True)
class Duration:
    """A part of a run, or its whole length: an amount of steps, epochs or pairs, or a percentage of the run."""

    amount: float
    unit: Unit

    def steps(self, *, batch_size: int, images: int, total: int | None = None) -> int:
        """The duration in steps, rounded to the nearest.

        An epoch has images // batch_size steps (its last images, which do not fill a batch, are left out); a step
        has `batch_size` pairs; a percentage is of the run's `total` steps.

        >>> Duration(10, "epochs").steps(batch_size=100, images=1050)
        100
        >>> Duration(30000, "pairs").steps(batch_size=256, images=1050)
        117
        >>> Duration(5, "%").steps(batch_size=256, images=1050, total=117)
        6
        """
        if self.unit == "steps":
            return round(self.amount)
        if self.unit == "epochs":
            return round(self.amount * (images // batch_size))
        if self.unit == "pairs":
            return round(self.amount / batch_size)
        if total is None:
            raise ValueError("a percentage needs the run's total steps")
        return round(self.amount / 100 * total)


def parse_duration(text: str, name: str, *, run_length: bool = False) -> Duration:
    """The duration that `text` says, as in 500steps, 10epochs (or 10ep), 30kpairs, 1.5Mpairs, 5%.

    The suffixes k, M and B stand for thousands, millions and billions. With `run_length` the duration is the run's
    own, which can't be zero or a percentage. Raises ConfigError, naming the setting --`name`.

    >>> parse_duration("1.5Mpairs", "duration")
    Duration(amount=1500000.0, unit='pairs')
    """
    found = DURATION.fullmatch(str(text).strip())
    examples = "500steps, 10epochs or 30kpairs" + ("" if run_length else ", or 5% of the run")
    if found is None or found["unit"] not in (*UNITS, None):
        raise ConfigError(f"--{name}: {text!r} is not a duration: write a number and its unit, as in {examples}")
    if found["unit"] is None:
        raise ConfigError(f"--{name}: {text!r} has no unit: write {text}steps, {text}epochs or {text}pairs")
    duration = Duration(float(found["number"]) * MULTIPLES[found["multiple"]], UNITS[found["unit"]])
    if run_length and duration.unit == "%":
        raise ConfigError(f"--{name}: {text!r} would be a share of the run's own length: write {examples}")
    if run_length and duration.amount == 0:
        raise ConfigError(f"--{name}: {text!r} leaves nothing to tune: write {examples}")
    if duration.unit == "%" and duration.amount > 100:
        raise ConfigError(f"--{name}: {text!r} is longer than the run: write at most 100%")
    return duration


def rate_share(
    step: int, steps: int, *, warmup: int = 0, decay: Decay = "cosine", timescale: int = 10_000, cooldown: int = 0
) -> float:
    """The share of the peak learning rate at `step` of `steps`.

    First a linear rise over `warmup` steps, (step + 1) / warmup (big_vision's is step / warmup, one step behind: its
    first step moves nothing). From then on, with s = step − warmup:

        cosine      (1 + cos(π s / (steps − warmup))) / 2
        constant    1
        rsqrt       √(timescale / (timescale + s)), the reciprocal square root of "Scaling Vision Transformers"
                    (arXiv 2106.04560), which does not depend on where the run ends

    The last `cooldown` steps are also multiplied by (steps − step) / cooldown. Cosine and cooldown would reach
    zero right after the last step, so that every step moves the weights. All lengths are in steps.

    >>> [round(rate_share(s, 5, warmup=1), 3) for s in range(5)]
    [1.0, 1.0, 0.854, 0.5, 0.146]
    >>> [round(rate_share(s, 6, warmup=2, decay="rsqrt", timescale=1, cooldown=2), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.707, 0.577, 0.25]
    """
    since = step - warmup
    if since < 0:
        share = (step + 1) / warmup
    elif decay == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * since / max(1, steps - warmup)))
    elif decay == "rsqrt":
        share = math.sqrt(timescale / (timescale + since))
    else:
        share = 1.0
    return share * min(1.0, (steps - step) / cooldown) if cooldown else share


@dataclass(frozen=True)
class Unlock:
    """When an unlocked image tower is tuned during the run (LiT, appendix H)."""

    kind: Literal["always", "after", "ramp", "cycles"] = "always"
    at: Duration | None = None
    """When it is unlocked (after), or half unlocked (ramp)."""
    cycles: int = 0

    def share(self, step: int, steps: int, *, batch_size: int, images: int) -> float:
        """What multiplies the scheduled learning rate of the image tower at `step`, in [0, 1]; 0 is locked.

        always: 1; after: 0, then 1; ramp: a sigmoid, 1/(1 + exp(−(step − at) / (0.02 × steps))), which is exactly
        0 where it is below 1e-3, up to 14% of the run before its centre; cycles: each cycle is locked for its
        first half and unlocked for its second.

        >>> half = Unlock("cycles", cycles=2)
        >>> [half.share(s, 8, batch_size=1, images=1) for s in range(8)]
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
        """
        if self.kind == "cycles":
            return float(2 * self.cycles * step // steps % 2)
        if self.at is None:
            return 1.0
        since = step - self.at.steps(batch_size=batch_size, images=images, total=steps)
        if self.kind == "after":
            return float(since >= 0)
        share = 0.5 * (1 + math.tanh(since / (RAMP_WIDTH * steps) / 2))  # the sigmoid, which can't overflow
        return share if share >= LOCKED_BELOW else 0.0


def parse_unlock(text: str, name: str) -> Unlock:
    """The unlocking that `text` says: always, after:50%, after:2000steps, ramp:50%, cycles:4.

    Raises ConfigError, naming the setting --`name`.

    >>> parse_unlock("after:50%", "image-unlock")
    Unlock(kind='after', at=Duration(amount=50.0, unit='%'), cycles=0)
    """
    kind, _, rest = str(text).partition(":")
    if text == "always":
        return Unlock()
    if kind == "after" and rest:
        return Unlock("after", at=parse_duration(rest, name))
    if kind == "ramp" and rest:
        return Unlock("ramp", at=parse_duration(rest, name))
    if kind == "cycles" and re.fullmatch("[1-9][0-9]*", rest):
        return Unlock("cycles", cycles=int(rest))
    raise ConfigError(
        f"--{name}: {text!r} is not known: write always, after:50%, after:2000steps, ramp:50% or cycles:4"
    )
