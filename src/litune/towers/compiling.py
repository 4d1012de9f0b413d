"""torch.compile with a fallback and a message: container images often lack a C compiler or Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import nn

from litune.progress import say
from litune.towers.specs import reason

SWITCH = "LITUNE_COMPILE"
"""Environment variable; 0 turns off all compiled code, fused.c on CPUs included."""


def compile_modules(modules: Sequence[nn.Module], try_out: Callable[[], object], what: str) -> bool:
    """Compile `modules` and run `try_out`, which calls them; returns whether they are compiled from now on.

    Compilation happens at the first call, so only a call shows whether it works. If that raises, the modules are
    restored and one line says why. Modules of one class share their compiled code.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        for module in modules:
            module.compile()
        try_out()
    except Exception as why:
        for module in modules:
            module._compiled_call_impl = None  # its value before `compile`
        say(f"{reason(f'{what} runs without torch.compile, and slower', why)}; {SWITCH}=0 doesn't try it")
        return False
    return True
