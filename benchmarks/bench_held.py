"""How much memory tensors take, as the operations that make them tell it: nothing of allocators and libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def storages(value: Any) -> list[torch.UntypedStorage]:
    """The memory of the tensors in a value, of those that ranks share this rank's; none that is small."""
    if isinstance(value, list | tuple):
        return [storage for one in value for storage in storages(one)]
    own = getattr(value, "_local_tensor", value)
    if not isinstance(own, torch.Tensor) or own.is_meta or own.untyped_storage().nbytes() < 2**15:
        return []
    return [own.untyped_storage()]


class Held(TorchDispatchMode):
    """`most`: the bytes of all tensors made inside that lived at once, as far as they are not small."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.storages = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages([*args, *(kwargs or {}).values()])}  # views are not new
        self.storages |= {one._weak_ref() for one in storages(result) if one._cdata not in given}
        living = {ref: torch.UntypedStorage._new_with_weak_ptr(ref) for ref in self.storages}
        self.storages = {ref for ref, storage in living.items() if storage is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in living.values() if storage is not None))
        return result
