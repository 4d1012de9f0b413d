from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from tests.forked import quick_python

from litune.devices import deterministic, receive, send, tf32_products

FAULTS = """
import resource, torch
from litune.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24).sum()  # 64 MB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = min(faults() for _ in range(5))
keep_freed_memory()
print(without, min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept() -> None:
    """Pages of a large block that was freed are there when one is asked for again."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    without, kept = map(int, done.stdout.split())
    assert kept < 100
    assert without > 10_000


def test_sums_in_one_order_on_a_gpu_and_afterwards_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


EXACT = """
import warnings
warnings.simplefilter("error")
import torch
from litune.devices import exact_float32

exact_float32()
assert torch.backends.cudnn.allow_tf32 is False
assert torch.backends.cuda.matmul.allow_tf32 is False
assert torch.get_float32_matmul_precision() == "highest"
if hasattr(torch.backends.cudnn, "conv"):  # from torch 2.9 on
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import torch; torch.set_float32_matmul_precision('high')",
        "import torch; torch.backends.cudnn.allow_tf32 = True",
        "import torch; getattr(torch.backends.cudnn, 'conv', torch.backends.cudnn).fp32_precision = 'tf32'",
    ],
)
def test_float32_is_float32(before: str) -> None:
    """Whatever was set before, and without a warning."""
    done = subprocess.run([quick_python(), "-c", before + EXACT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_to_be_done_on_the_processor() -> None:
    values = torch.ones(3)
    assert send(values, torch.device("cpu")) is values
    assert receive(values)() is values


@pytest.mark.parametrize(
    ("device", "bfloat16", "inside"), [("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")]
)
def test_tf32_is_for_runs_in_bfloat16_on_a_gpu(device: str, bfloat16: bool, inside: str) -> None:
    with tf32_products(torch.device(device), bfloat16):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
