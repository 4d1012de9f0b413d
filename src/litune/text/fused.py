"""The same encoder as `litune.text.bert`, in bfloat16 on CPUs, with what fused.c does between the matrix products.

Where a C compiler is at hand, fused.c is compiled once (some seconds) and kept in the user's cache. One function there
goes over memory once where torch's operators go several times; on a small tower that is half of a step. Texts lie one
after the other, without padding between them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from litune.files import cache_folder
from litune.progress import say
from litune.text.dropout import draw_seed
from litune.towers.compiling import SWITCH

SOURCE = Path(__file__).with_name("fused.c")
FLAGS = (
    "-Wno-psabi",  # vectors wider than the processor's are passed in memory; nothing but this file calls
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
LANES = 16
"""All widths must be multiples of this, that of an attention head too."""

_LONG, _DOUBLE, _POINTER = ctypes.c_long, ctypes.c_double, ctypes.c_void_p
_TYPES: dict[type, Any] = {int: _LONG, float: _DOUBLE}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler for them (said once), or they are switched off."""
    if os.environ.get(SWITCH) == "0" or platform.system() != "Linux":
        return None
    compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "")
    try:
        if not compiler:
            raise FileNotFoundError("there is no C compiler")
        return ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as why:
        say(f"the text tower runs slower than it could, {SOURCE.name} can't be compiled ({why}): install gcc")
        return None


def compiled(compiler: Sequence[str]) -> Path:
    """The shared library of this source for this processor, made if it is not in the cache."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    made_of = b"\0".join([SOURCE.read_bytes(), told, shlex.join([*compiler, *FLAGS]).encode(), processor()])
    folder = cache_folder()
    file = folder / f"fused-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not file.exists():
        say("compiling the text tower's operations for this processor, once")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / file.name
            command = [*compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=600)
            made.replace(file)
    return file


def processor() -> bytes:
    """What instructions the processor has: a library made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def call(name: str, *values: Tensor | int | float) -> None:
    """Run a function of fused.c with torch's number of threads; tensors go as pointers, so they must be contiguous."""
    given: list[Any] = [_LONG(torch.get_num_threads())]
    for value in values:
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            given.append(_POINTER(value.data_ptr()))
        else:
            given.append(_TYPES[type(value)](value))
    function = getattr(library(), name)
    function.restype = None
    function(*given)


def partial_sums(*shape: int) -> Tensor:
    """Zeros per thread, to add gradients up in."""
    return torch.zeros(torch.get_num_threads(), *shape)


def draw(p: float) -> int:
    """A seed for dropout; none is drawn where nothing is dropped."""
    return draw_seed() if p else 0


def matmul(x: Float[Tensor, "S W"], *weights: Float[Tensor, "_ W"]) -> Float[Tensor, "S V"]:
    """The products of x [S, W] in bfloat16 and float32 weights, each [V_i, W], side by side: [S, Σ V_i]."""
    return branch(x, *weights)[1]


def branch(x: Float[Tensor, "S W"], *weights: Float[Tensor, "_ W"]) -> tuple[Tensor, Tensor]:
    """X and `matmul` of it. Of what goes on with this x the gradient is added where matmul's is made, in place."""
    found: tuple[Tensor, Tensor] = _Matmul.apply(x, *weights)
    return found


class _Matmul(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([weight.to(x.dtype) for weight in weights]) if len(weights) > 1 else weights[0].to(x.dtype)
        ctx.save_for_backward(x, joined)
        ctx.sizes = [len(weight) for weight in weights]
        ctx.set_materialize_grads(False)
        return x, x @ joined.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        to_x, g = gradients
        if g is None:
            return to_x, *(None for _ in ctx.sizes)
        g = g.contiguous()
        if ctx.needs_input_grad[0]:
            to_x = g @ joined if to_x is None else to_x.addmm_(g, joined)
        if not any(ctx.needs_input_grad[1:]):
            return to_x, *(None for _ in ctx.sizes)
        # Matrix libraries are slow where the first factor lies transposed, so the narrower one is turned before.
        to_joined = (turned(g) @ x).float() if g.shape[1] <= x.shape[1] else turned(turned(x) @ g, "transpose_wide")
        return to_x, *to_joined.split(ctx.sizes)


def turned(x: Float[Tensor, "S W"], how: str = "transpose") -> Float[Tensor, "W S"]:
    """The transpose, in memory too; "transpose_wide": in float32."""
    out = x.new_empty(x.shape[1], x.shape[0], dtype=torch.float32 if how == "transpose_wide" else None)
    call(how, *x.shape, x, out)
    return out


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        slope = torch.empty_like(x)
        assert x.shape[1] % LANES == 0
        call("gelu", *x.shape, x, bias, x, slope)  # in place: nothing else reads it, and its memory is at hand
        ctx.mark_dirty(x)
        ctx.save_for_backward(slope)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = ctx.saved_tensors
        to_x, sums = torch.empty_like(slope), partial_sums(slope.shape[1])
        call("gelu_backward", *slope.shape, gradients[0].contiguous(), slope, to_x, sums)
        return to_x, sums.sum(0)


class _Drop(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out = torch.empty_like(x)
        ctx.settings = draw(p), p
        assert x.shape[1] % LANES == 0
        call("drop_values", x.numel(), x, *ctx.settings, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        to_out = gradients[0].contiguous()
        to_x = torch.empty_like(to_out)
        call("drop_values", to_x.numel(), to_out, *ctx.settings, to_x)
        return to_x, None


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, p: float
    ) -> Tensor:
        added, out, seed = torch.empty_like(x), torch.empty_like(x), draw(p)
        assert x.shape[1] % LANES == 0
        call("add_norm", *x.shape, x, y, bias, gamma, beta, eps, seed, p, added, out)
        ctx.save_for_backward(added, gamma)
        ctx.settings = eps, seed, p
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        added, gamma = ctx.saved_tensors
        to_x, to_y, sums = torch.empty_like(added), torch.empty_like(added), partial_sums(3, added.shape[1])
        g = gradients[0].contiguous()
        call("add_norm_backward", *added.shape, g, added, gamma, *ctx.settings, to_x, to_y, sums)
        to_gamma, to_beta, to_bias = sums.sum(0)
        return to_x, to_y, to_bias, to_gamma, to_beta, None, None


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, first: Tensor, lengths: Tensor, heads: int, p: float) -> Tensor:
        tokens, width = qkv.shape[0], qkv.shape[1] // 3
        used, longest = int(lengths.sum()), int(lengths.max())
        ctx.settings = len(lengths), first, lengths, longest, heads, width // heads
        ctx.seed, ctx.p, ctx.used = draw(p), p, used
        ctx.save_for_backward(qkv, bias)
        out = qkv.new_empty(tokens, width)
        out[used:] = 0
        call("attention", *ctx.settings, qkv, bias, ctx.seed, p, work_space(longest, width // heads), out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        to_qkv, sums = torch.empty_like(qkv), partial_sums(qkv.shape[1])
        to_qkv[ctx.used :] = 0
        space = work_space(ctx.settings[3], ctx.settings[5])
        g = gradients[0].contiguous()
        call("attention_backward", *ctx.settings, g, qkv, bias, ctx.seed, ctx.p, space, to_qkv, sums)
        return to_qkv, sums.sum(0), None, None, None, None


def work_space(longest: int, depth: int) -> Tensor:
    """Room for every thread to attend in, for texts of at most `longest` tokens and heads of width `depth`."""
    functions = library()
    assert functions is not None
    functions.attention_space.restype = _LONG
    needed = functions.attention_space(_LONG(longest), _LONG(depth))
    return torch.empty(torch.get_num_threads(), needed)


def drop(x: Float[Tensor, "1 S W"], p: float, training: bool) -> Float[Tensor, "1 S W"]:
    """Dropout of `x`, in bfloat16."""
    found: Tensor = _Drop.apply(x.squeeze(0), float(p))[None] if training and p > 0 else x
    return found


def encode_layer(
    layer: Any, x: Float[Tensor, "S W"], first: Tensor, lengths: Tensor, heads: int, p: float, p_attention: float
) -> Float[Tensor, "S W"]:
    """A layer of a transformers BERT on texts that lie one after the other, with dropout `p` and `p_attention`.

    Text i is the `lengths[i]` rows from `first[i]` on; rows after the last text are filling.
    """
    attend, out = layer.attention.self, layer.attention.output
    x, qkv = branch(x, attend.query.weight, attend.key.weight, attend.value.weight)
    bias = torch.cat([attend.query.bias, attend.key.bias, attend.value.bias])
    mixed = matmul(_Attention.apply(qkv, bias, first, lengths, heads, p_attention), out.dense.weight)
    x = add_norm(x, mixed, out.dense.bias, out.LayerNorm, p)
    inner, outer = layer.intermediate.dense, layer.output.dense
    x, wide = branch(x, inner.weight)
    wide = _Gelu.apply(wide, inner.bias)
    return add_norm(x, matmul(wide, outer.weight), outer.bias, layer.output.LayerNorm, p)


def add_norm(
    x: Float[Tensor, "S W"], y: Float[Tensor, "S W"], bias: Float[Tensor, " W"], norm: nn.LayerNorm, p: float
) -> Float[Tensor, "S W"]:
    """norm(x + dropout(y + bias))."""
    found: Tensor = _AddNorm.apply(x, y, bias, norm.weight, norm.bias, norm.eps, float(p))
    return found
