"""A text tower that no process holds whole: built without its weights, of which each rank reads or draws its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from litune.errors import TowerError
from litune.sharding import own_rows
from litune.text.registry import HfTextTower, TextTower


class DrawnRows(TorchDispatchMode):
    """Keeps this rank's rows of what modules write into their parameters, where these are on the meta device.

    A change is made to a whole parameter, which is gone after it: one at a time is whole. Random numbers are drawn in
    the order of the whole tower, so that its weights are those of a tower built as usual after the same seed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, parameter: Tensor) -> Tensor:
        """A stand-in on the meta device; rows are kept of what `parameter` holds and of all that is written into it."""
        stand_in = torch.empty_like(parameter, device="meta")
        self._kept[_memory(stand_in)] = stand_in, parameter.detach()[own_rows(len(parameter))].clone()
        return stand_in

    def rows(self, parameter: Tensor) -> Tensor:
        """The rows of a parameter that are this rank's, by its stand-in."""
        return self._kept[_memory(parameter)][1]

    def write(self, written: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
        """Make a `change` to what a stand-in, or a view of one, stands for."""
        stand_in, rows = self._kept[_memory(written)]
        whole = torch.empty_like(stand_in, device="cpu")
        own = whole[own_rows(len(whole))]
        own.copy_(rows)
        change(whole.as_strided(written.shape, written.stride(), written.storage_offset()))
        rows.copy_(own)
        return written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that writes into a stand-in, on what it stands for."""
        kwargs = kwargs or {}
        written = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        if written is None or not written.is_meta or _memory(written) not in self._kept:
            return func(*args, **kwargs)
        return self.write(written, lambda whole: func(whole, *args[1:], **kwargs))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def without_weights(drawn: DrawnRows | None = None) -> Iterator[None]:
    """Inside, modules get their parameters on the meta device, buffers as ever; what they draw is left to `drawn`."""
    register, truncated = nn.Module.register_parameter, nn.init._no_grad_trunc_normal_

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            stand_in = parameter.to("meta") if drawn is None else drawn.add(parameter)
            parameter = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    def draw_truncated(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # It draws until all values of a parameter are within bounds; of one on the meta device it draws none.
        if drawn is None or not tensor.is_meta:
            return truncated(tensor, *args, **kwargs)
        return drawn.write(tensor, lambda whole: truncated(whole, *args, **kwargs))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    nn.init._no_grad_trunc_normal_ = draw_truncated
    try:
        with drawn or nullcontext():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.init._no_grad_trunc_normal_ = truncated


class StoredRows:
    """Reads this rank's rows of a tower's parameters from safetensors files, when they are asked for."""

    def __init__(self, files: Sequence[Path | str], tower: nn.Module, names: Callable[[str], Sequence[str]]) -> None:
        """Files that have the parameters of `tower` under one of their `names`."""
        opened: list[Any] = [safe_open(file, framework="pt") for file in files]
        self.at = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        self.names: dict[Tensor, list[str]] = {}
        for name, parameter in tower.named_parameters(remove_duplicate=False):  # tied ones may have any of theirs
            self.names.setdefault(parameter, []).extend(names(name))

    def __call__(self, parameter: Tensor) -> Tensor:
        """The rows of a parameter that are this rank's, in float32.

        Raises `TowerError` where no file has it in its shape.
        """
        shape = list(parameter.shape)
        for key in (key for key in self.names[parameter] if key in self.at):
            stored = self.at[key].get_slice(key)
            if stored.get_shape() == shape:
                rows = own_rows(len(parameter))
                empty = rows.start == rows.stop  # safetensors refuses to read nothing
                return torch.empty(0, *shape[1:]) if empty else stored[rows].float()
        raise TowerError(f"no safetensors file of the tower has {self.names[parameter][0]!r} in the shape {shape}")


def hf_files(name: str) -> list[str]:
    """The safetensors files of a model of transformers: a folder, or a name on the Hub, from which they are fetched."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return [found] if file == SAFE_WEIGHTS_NAME else get_checkpoint_shard_files(name, found)[0]
    raise TowerError(f"{name} has no weights in safetensors files: those alone can be read with --shard")


def hf_names(tower: TextTower) -> Callable[[str], Sequence[str]]:
    """The names that files of transformers may have for a parameter of a tower: with the prefix of its kind, older."""
    assert isinstance(tower, HfTextTower)
    prefix = tower.model.base_model_prefix

    def names(name: str) -> Sequence[str]:
        name = name.removeprefix("model.")
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return [name, f"{prefix}.{name}", old, f"{prefix}.{old}"]

    return names
