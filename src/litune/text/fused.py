"""The layers of `litune.text.bert` in bfloat16 on CPUs, with fused kernels (fused.c) between the matrix products.

If there is a C compiler, fused.c is compiled once (some seconds) and kept in the user's cache. Each of its functions
makes one pass over memory where torch's operators make several; for a small tower that is half of a step. Texts are
concatenated, without padding between them.
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

SWITCH = "LITUNE_COMPILE"
"""Environment variable; 0 does without fused.c."""
SOURCE = Path(__file__).with_name("fused.c")
FLAGS = (
    "-Wno-psabi",  # vectors wider than the CPU's registers go through memory: harmless, all callers are in this file
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
"""All widths, including that of an attention head, must be multiples of this."""

_LONG, _DOUBLE, _POINTER = ctypes.c_long, ctypes.c_double, ctypes.c_void_p
_TYPES: dict[type, Any] = {int: _LONG, float: _DOUBLE}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None if they can't be compiled (reported once) or are switched off."""
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
    """The shared library of fused.c for this CPU, compiled if it is not in the cache."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    inputs = b"\0".join([SOURCE.read_bytes(), version, shlex.join([*compiler, *FLAGS]).encode(), processor()])
    folder = cache_folder()
    file = folder / f"fused-{hashlib.sha256(inputs).hexdigest()[:16]}.so"
    if not file.exists():
        say("compiling the text tower's operations for this processor, once")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / file.name
            command = [*compiler, *FLAGS, "-o", str(built), str(SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=600)
            built.replace(file)
    return file


def processor() -> bytes:
    """The CPU's model and instruction sets: a library compiled for one CPU may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def call(name: str, *values: Tensor | int | float) -> None:
    """Run a function of fused.c with torch's number of threads; tensors go as pointers and must be contiguous."""
    arguments: list[Any] = [_LONG(torch.get_num_threads())]
    for value in values:
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            arguments.append(_POINTER(value.data_ptr()))
        else:
            arguments.append(_TYPES[type(value)](value))
    function = getattr(library(), name)
    function.restype = None
    function(*arguments)


def partial_sums(*shape: int) -> Tensor:
    """A zero tensor per thread, in which gradients are accumulated: [threads, *shape]."""
    return torch.zeros(torch.get_num_threads(), *shape)


def draw(p: float) -> int:
    """A random seed for dropout; 0, without using the generator, if nothing is dropped."""
    return draw_seed() if p else 0


def matmul(x: Float[Tensor, "S W"], *weights: Float[Tensor, "_ W"]) -> Float[Tensor, "S V"]:
    """The products of x [S, W] in bfloat16 and float32 weights, each [V_i, W], concatenated: [S, Σ V_i]."""
    return branch(x, *weights)[1]


def branch(x: Float[Tensor, "S W"], *weights: Float[Tensor, "_ W"]) -> tuple[Tensor, Tensor]:
    """The tuple (x, matmul(x)). In the backward pass, the gradients of both are summed in place."""
    outputs: tuple[Tensor, Tensor] = _Matmul.apply(x, *weights)
    return outputs


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
        # Matrix libraries are slow if the first factor is a transposed view, so the narrower one is copied transposed.
        to_joined = (
            (transposed(g) @ x).float() if g.shape[1] <= x.shape[1] else transposed(transposed(x) @ g, "transpose_wide")
        )
        return to_x, *to_joined.split(ctx.sizes)


def transposed(x: Float[Tensor, "S W"], how: str = "transpose") -> Float[Tensor, "W S"]:
    """The transpose as a contiguous copy; "transpose_wide" returns float32."""
    out = x.new_empty(x.shape[1], x.shape[0], dtype=torch.float32 if how == "transpose_wide" else None)
    call(how, *x.shape, x, out)
    return out


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        slope = torch.empty_like(x)
        assert x.shape[1] % LANES == 0
        call("gelu", *x.shape, x, bias, x, slope)  # in place: nothing else reads x, and its memory is in the cache
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


class _FusedAttention(Function):
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
    """Scratch memory for attention, per thread, for texts of at most `longest` tokens and heads of width `depth`."""
    functions = library()
    assert functions is not None
    functions.attention_space.restype = _LONG
    needed = functions.attention_space(_LONG(longest), _LONG(depth))
    return torch.empty(torch.get_num_threads(), needed)


def drop(x: Float[Tensor, "1 S W"], p: float, training: bool) -> Float[Tensor, "1 S W"]:
    """Dropout of `x`, in bfloat16."""
    dropped: Tensor = _Drop.apply(x.squeeze(0), float(p))[None] if training and p > 0 else x
    return dropped


def encode_layer(
    layer: Any, x: Float[Tensor, "S W"], first: Tensor, lengths: Tensor, heads: int, p: float, p_attention: float
) -> Float[Tensor, "S W"]:
    """A layer of a transformers BERT on concatenated texts, with dropout `p` and `p_attention`.

    Text i is the `lengths[i]` rows from `first[i]` on; rows after the last text are padding.
    """
    attend, out = layer.attention.self, layer.attention.output
    x, qkv = branch(x, attend.query.weight, attend.key.weight, attend.value.weight)
    bias = torch.cat([attend.query.bias, attend.key.bias, attend.value.bias])
    mixed = matmul(_FusedAttention.apply(qkv, bias, first, lengths, heads, p_attention), out.dense.weight)
    x = add_norm(x, mixed, out.dense.bias, out.LayerNorm, p)
    inner, outer = layer.intermediate.dense, layer.output.dense
    x, wide = branch(x, inner.weight)
    wide = _Gelu.apply(wide, inner.bias)
    return add_norm(x, matmul(wide, outer.weight), outer.bias, layer.output.LayerNorm, p)


def add_norm(
    x: Float[Tensor, "S W"], y: Float[Tensor, "S W"], bias: Float[Tensor, " W"], norm: nn.LayerNorm, p: float
) -> Float[Tensor, "S W"]:
    """norm(x + dropout(y + bias))."""
    normalised: Tensor = _AddNorm.apply(x, y, bias, norm.weight, norm.bias, norm.eps, float(p))
    return normalised
