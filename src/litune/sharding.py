"""A tower whose weights, gradients and optimizer states are shared by the ranks (FSDP2, arXiv 2304.11277).

Each rank holds its rows of every parameter. A layer is complete on a rank only while it runs, forward or backward; the
backward pass leaves each rank the gradient of its own rows. The optimizer only sees plain tensors, the rank's rows.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from litune import distributed
from litune.errors import ConfigError, RunError
from litune.files import write_json

Rows = Callable[[Tensor], Tensor]
"""For a parameter on the meta device, this rank's rows of it (see `own_rows`), in float32."""


def share(
    tower: nn.Module, parts: Sequence[nn.Module], rows: Rows, device: torch.device, *, bfloat16: bool = False
) -> None:
    """Fill the parameters of `tower`, which are on the meta device, with each rank's rows, and shard it from here on.

    Of its `parts`, the token table and every layer, one at a time is gathered, as are the parameters outside of them.
    Every rank must run the tower equally often, forward and backward. With `bfloat16`, layers compute in it and weights
    are gathered in it; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: F401
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:
        raise ConfigError(
            f"--shard needs torch 2.9 or newer, this is {torch.__version__}: pip install -U torch"
        ) from None

    # FSDP2 warns of layers that return views, which could be modified in place: text towers don't.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    filled = {name: rows(parameter).to(device) for name, parameter in tower.named_parameters()}
    # Without a mesh FSDP2 uses the machine's GPUs, whatever `device` is.
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # Autocast decides how a layer's inputs are cast. Tables are float32, as in a tower that is not sharded.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for part in (*parts, tower):
        layer = part is not tower and not isinstance(part, nn.Embedding)
        policy = low if bfloat16 and layer else MixedPrecisionPolicy()
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    tower.load_state_dict(
        {name: _shared(own, tower.get_parameter(name)) for name, own in filled.items()}, strict=False, assign=True
    )
    for module in tower.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


class Shards:
    """The optimizer's view of a sharded tower."""

    def __init__(self, tower: nn.Module) -> None:
        self.parameters: dict[str, Any] = dict(tower.named_parameters())
        self.own = {
            name: nn.Parameter(own_part(p).detach(), requires_grad=p.requires_grad)
            for name, p in self.parameters.items()
        }
        """This rank's rows of every parameter, by name: what the optimizer steps."""

    def take_gradients(self) -> None:
        """After the backward passes, move the gradients, summed over ranks, to the parameters of `own`."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                # FSDP2 gives the mean.
                self.own[name].grad = parameter.grad.to_local().mul_(distributed.world_size())
                parameter.grad = None

    def shared(self, name: str, own: Tensor) -> Tensor:
        """Each rank's own rows, laid out like the parameter `name`, as one sharded tensor."""
        return _shared(own, self.parameters[name])


STATES, FACTS = "state-*", "facts.json"
"""A state's folder, and the file written into it last: without it, the state is incomplete."""


def save_state(run: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state of a run at `facts["step"]`, each rank its own rows, and drop the previous state.

    A folder of safetensors files, written by torch.distributed.checkpoint: any number of ranks can read it.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = run / STATES.replace("*", str(facts["step"]))
    if distributed.from_main((folder / FACTS).exists):
        return
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone() as alone:
        save(tensors, storage_writer=writer, no_dist=alone)
    if distributed.is_main():
        write_json(folder / FACTS, facts)
        drop_states(run, but=folder)


def drop_states(run: Path, but: Path | None = None) -> None:
    """Remove the states of a run, complete or not, except one."""
    for folder in run.glob(STATES):
        if folder != but:
            shutil.rmtree(folder)


def find_state(run: Path) -> Path | None:
    """The folder of a run's state, if it has one."""
    folders = (path.parent for path in run.glob(f"{STATES}/{FACTS}"))
    return max(folders, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def load_state(folder: Path, tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
    """Read a state into the tensors, sharded or not, that `tensors` returns for the saved ones (on the meta device)."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    sizes: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    saved = {name: torch.empty(size.size, dtype=size.properties.dtype, device="meta") for name, size in sizes.items()}
    wanted = tensors(saved)
    if missing := sorted(wanted.keys() - saved.keys()):
        raise RunError(f"{folder} is damaged ({missing[0]} is missing): restore it, or tune again with --overwrite")
    with _alone() as alone:
        load(wanted, storage_reader=reader, no_dist=alone)


@contextmanager
def _alone() -> Iterator[bool]:
    """Yield whether there is one process, without torch.distributed.checkpoint's warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield distributed.world_size() == 1


def is_shared(tensor: Tensor) -> bool:
    """Whether each rank has only its rows of this tensor."""
    if distributed.world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # slow to import

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds; all rows if it is not sharded."""
    return cast(Any, tensor).to_local() if is_shared(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor, on every rank; all ranks must call this."""
    return cast(Any, tensor).full_tensor() if is_shared(tensor) else tensor


def own_rows(count: int) -> slice:
    """The rows of `count` that this rank holds, as FSDP2 distributes them: the last ranks may have fewer or none."""
    share = -(-count // distributed.world_size())
    begin = min(count, distributed.rank() * share)
    return slice(begin, min(count, begin + share))


def _shared(own: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
