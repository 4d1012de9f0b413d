from __future__ import annotations

import math
import subprocess
import sys

import pytest

from litune.errors import ConfigError
from litune.schedules import Duration, Unlock, parse_duration, parse_unlock, rate_share


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500steps", 500, "steps"),
        ("1step", 1, "steps"),
        ("10epochs", 10, "epochs"),
        ("10ep", 10, "epochs"),
        ("0.5epochs", 0.5, "epochs"),
        ("30000pairs", 30_000, "pairs"),
        ("30kpairs", 30_000, "pairs"),
        ("1.5Mpairs", 1_500_000, "pairs"),
        ("18Bpairs", 18e9, "pairs"),
        ("60ksteps", 60_000, "steps"),
        (" 500 steps ", 500, "steps"),
        ("5%", 5, "%"),
        ("0%", 0, "%"),
        ("100%", 100, "%"),
    ],
)
def test_durations(text: str, amount: float, unit: str) -> None:
    found = parse_duration(text, "warmup")
    assert (found.amount, found.unit) == (amount, unit)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("500", "has no unit: write 500steps, 500epochs or 500pairs"),
        ("30k", "has no unit: write 30ksteps"),
        ("", "is not a duration"),
        ("steps", "is not a duration"),
        ("-5steps", "is not a duration"),
        ("5hours", "is not a duration"),
        ("5Ksteps", "is not a duration"),
        ("1e3steps", "is not a duration"),
        ("nan%", "is not a duration"),
        ("101%", "write at most 100%"),
    ],
)
def test_refused_durations(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        parse_duration(text, "warmup")
    assert str(error.value).startswith("--warmup: ")
    assert "\n" not in str(error.value)


def test_the_run_itself_is_no_share_and_not_empty() -> None:
    assert parse_duration("10ep", "duration", run_length=True).unit == "epochs"
    with pytest.raises(ConfigError, match="a share of the run's own length"):
        parse_duration("5%", "duration", run_length=True)
    with pytest.raises(ConfigError, match="nothing to tune"):
        parse_duration("0epochs", "duration", run_length=True)
    with pytest.raises(ValueError, match="total"):
        Duration(5, "%").steps(batch_size=2, images=4)


def test_steps_of_durations() -> None:
    def steps(text: str, total: int | None = None) -> int:
        return parse_duration(text, "warmup").steps(batch_size=16_384, images=10_000_000, total=total)

    assert steps("2ksteps") == 2000
    assert steps("20epochs") == 20 * 610  # METHOD, section 6: CC12M, 20 epochs, 12k steps
    assert steps("18Bpairs") == round(18e9 / 16_384)
    assert steps("5%", 12_000) == 600
    assert steps("0.001%", 12_000) == 0


def test_cosine() -> None:
    shares = [rate_share(s, 100, warmup=10) for s in range(100)]
    assert shares[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert shares[-1] > 0
    assert rate_share(0, 10) == 1.0


def test_a_run_that_is_all_warmup() -> None:
    assert [rate_share(s, 4, warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate_share(0, 1, warmup=0) == 1.0


def test_constant_and_cooldown() -> None:
    assert [rate_share(s, 6, warmup=2, decay="constant") for s in range(6)] == [0.5, 1, 1, 1, 1, 1]
    cooled = [rate_share(s, 6, warmup=2, decay="constant", cooldown=3) for s in range(6)]
    assert cooled == pytest.approx([0.5, 1, 1, 1, 2 / 3, 1 / 3])


def test_reciprocal_square_root() -> None:
    share = [rate_share(s, 1000, warmup=100, decay="rsqrt", timescale=50) for s in range(1000)]
    assert share[99] == share[100] == 1.0  # continuous where the warm-up ends
    assert share[150] == pytest.approx(math.sqrt(1 / 2))
    assert share[100 + 3 * 50] == pytest.approx(1 / 2)
    assert share[500] == rate_share(500, 10**6, warmup=100, decay="rsqrt", timescale=50)  # whatever the end
    cooled = rate_share(990, 1000, warmup=100, decay="rsqrt", timescale=50, cooldown=20)
    assert cooled == pytest.approx(share[990] / 2)


def shares(text: str, steps: int) -> list[float]:
    unlock = parse_unlock(text, "unlock")
    return [unlock.share(s, steps, batch_size=10, images=100) for s in range(steps)]


def test_unlocking() -> None:
    assert shares("always", 4) == [1.0] * 4
    assert shares("after:50%", 4) == [0, 0, 1, 1]
    assert shares("after:3steps", 4) == [0, 0, 0, 1]
    assert shares("after:1epoch", 20) == [0.0] * 10 + [1.0] * 10
    assert shares("after:9steps", 4) == [0.0] * 4
    assert shares("cycles:1", 5) == [0, 0, 0, 1, 1]
    assert shares("cycles:3", 12) == [0, 0, 1, 1] * 3


def test_the_ramp_begins_at_exactly_zero() -> None:
    ramp = shares("ramp:50%", 1000)
    assert ramp[500] == 0.5
    assert ramp[520] == pytest.approx(1 / (1 + math.exp(-1)))
    assert ramp[480] == pytest.approx(1 / (1 + math.exp(1)))
    locked = [s for s, share in enumerate(ramp) if share == 0]
    assert locked == list(range(362))  # 6.9 widths of 20 steps before the centre
    assert ramp[362] >= 1e-3
    assert ramp == sorted(ramp)
    assert ramp[-1] == pytest.approx(1)
    assert shares("ramp:1Msteps", 10) == [0.0] * 10  # far beyond the end: no overflow


@pytest.mark.parametrize("text", ["", "never", "always:1", "after", "after:", "ramp", "cycles:0", "cycles:1.5", "x:5%"])
def test_refused_unlocking(text: str) -> None:
    with pytest.raises(ConfigError, match="--image-unlock: .*write always, after:50%"):
        parse_unlock(text, "image-unlock")


def test_refused_unlocking_says_what_is_wrong_with_its_duration() -> None:
    with pytest.raises(ConfigError, match="--image-unlock: '50' has no unit"):
        parse_unlock("after:50", "image-unlock")


def test_unlock_by_default() -> None:
    assert Unlock() == parse_unlock("always", "unlock")


def test_imports_no_torch() -> None:
    code = "import sys, litune.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
