"""torch.compile where it runs, and a line where it doesn't: images for containers often lack a C compiler or Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import nn

from litune.progress import say
from litune.towers.specs import reason

SWITCH = "LITUNE_COMPILE"
"""Environment variable: 0 leaves everything to torch's operators, on processors too."""


def compile_modules(modules: Sequence[nn.Module], try_out: Callable[[], object], what: str) -> bool:
    """Compile `modules` and run `try_out`, which calls them; whether they are compiled from now on.

    Compilers work at the first call, so only a call shows whether they can. Where that raises, the modules are as they
    were, and one line says why. Modules of one class share what is compiled.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        for module in modules:
            module.compile()
        try_out()
    except Exception as why:
        for module in modules:
            module._compiled_call_impl = None  # as it is before `compile`
        say(f"{reason(f'{what} runs without torch.compile, and slower', why)}; {SWITCH}=0 doesn't try it")
        return False
    return True
