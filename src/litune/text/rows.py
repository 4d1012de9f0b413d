"""Text towers that no process holds whole: built without weights, of which each rank then reads or draws its rows."""

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
    """Keeps this rank's rows of what modules write into parameters that are on the meta device.

    Each write is applied to a temporary copy of the whole parameter, one parameter at a time. Random numbers are drawn
    in the order of the whole tower, so that its weights equal those of a tower built as usual with the same seed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, parameter: Tensor) -> Tensor:
        """A stand-in on the meta device; this rank's rows of `parameter`, and of later writes into it, are kept."""
        stand_in = torch.empty_like(parameter, device="meta")
        self._kept[_memory(stand_in)] = stand_in, parameter.detach()[own_rows(len(parameter))].clone()
        return stand_in

    def rows(self, parameter: Tensor) -> Tensor:
        """The rank's rows of the parameter that a stand-in represents."""
        return self._kept[_memory(parameter)][1]

    def write(self, target: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
        """Apply `change` to the parameter that a stand-in, or a view of one, represents."""
        stand_in, rows = self._kept[_memory(target)]
        whole = torch.empty_like(stand_in, device="cpu")
        own = whole[own_rows(len(whole))]
        own.copy_(rows)
        change(whole.as_strided(target.shape, target.stride(), target.storage_offset()))
        rows.copy_(own)
        return target

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that writes into a stand-in is applied to the parameter itself."""
        kwargs = kwargs or {}
        target = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        if target is None or not target.is_meta or _memory(target) not in self._kept:
            return func(*args, **kwargs)
        return self.write(target, lambda whole: func(whole, *args[1:], **kwargs))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def without_weights(drawn: DrawnRows | None = None) -> Iterator[None]:
    """Within it, modules get parameters, but not buffers, on the meta device; `drawn` keeps what they draw."""
    register, truncated = nn.Module.register_parameter, nn.init._no_grad_trunc_normal_

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            stand_in = parameter.to("meta") if drawn is None else drawn.add(parameter)
            parameter = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    def draw_truncated(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # It redraws until all values are within bounds, which does nothing on the meta device.
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
    """Reads this rank's rows of a tower's parameters from safetensors files, on demand."""

    def __init__(self, files: Sequence[Path | str], tower: nn.Module, names: Callable[[str], Sequence[str]]) -> None:
        """`files` hold the parameters of `tower`, each under one of its `names`."""
        opened: list[Any] = [safe_open(file, framework="pt") for file in files]
        self.at = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        self.names: dict[Tensor, list[str]] = {}
        for name, parameter in tower.named_parameters(
            remove_duplicate=False
        ):  # tied parameters may be stored under any of their names
            self.names.setdefault(parameter, []).extend(names(name))

    def __call__(self, parameter: Tensor) -> Tensor:
        """The rank's rows of a parameter, in float32.

        Raises `TowerError` where no file has the parameter in its shape.
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
    """The safetensors files of a transformers model, in a folder or downloaded from the Hub."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        file_path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if file_path is not None:
            return [file_path] if file == SAFE_WEIGHTS_NAME else get_checkpoint_shard_files(name, file_path)[0]
    raise TowerError(f"{name} has no weights in safetensors files: those alone can be read with --shard")


def hf_names(tower: TextTower) -> Callable[[str], Sequence[str]]:
    """A function from a parameter's name to its possible names in transformers' files: with a prefix, or older ones."""
    assert isinstance(tower, HfTextTower)
    prefix = tower.model.base_model_prefix

    def names(name: str) -> Sequence[str]:
        name = name.removeprefix("model.")
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return [name, f"{prefix}.{name}", old, f"{prefix}.{old}"]

    return names
