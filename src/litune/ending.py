"""How the command ends: one line of what is wrong, said once by several processes, and the exit status."""

from __future__ import annotations

import errno
import os
import re
import sys
import time

# Seconds that a failed process waits for torchrun to end it, because the one that speaks for all has failed as well.
PATIENCE = 10.0
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain(why: OSError) -> str:
    """What the system refused, and what to do; a temporary file is named as the file that it was to become."""
    name = re.sub(r"\.([^/]+)\.\d+\.tmp$", r"\1", os.fsdecode(why.filename)) if why.filename else ""
    if why.errno in FULL_DISK:
        where = f" while writing {name}" if name else ""
        return f"the disk is full{where} ({why.strerror}): what is finished is kept; free space, then the same command"
    return f"{name or 'a file'}: {why.strerror}: choose another path, or change what is there"


def several_ranks() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def own_rank() -> int:
    """The number of this process among those that torchrun started; 0 is the one that speaks."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def fail(message: str) -> None:
    """Print one line and exit with 2. Where all processes fail alike, rank 0 alone has the time to say so."""
    message = " ".join(message.split())
    leave(f"litune: error: {f'rank {own_rank()}: ' if own_rank() else ''}{message}", message, 2)


def leave(line: str, why: str, code: int) -> None:
    """Print `line` and exit; of several processes, the others end as well and are told `why`."""
    if several_ranks() and "litune.distributed" in sys.modules:
        sys.modules["litune.distributed"].leave(line, why, code)  # does not return from a group
    if own_rank() > 0:
        time.sleep(PATIENCE)
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)
