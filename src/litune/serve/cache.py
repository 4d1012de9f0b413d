"""An LRU cache of bounded size in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Values by key, up to `limit` bytes in all as counted by the callers; thread-safe.

    >>> cache = Cache[str, int](limit=10)
    >>> for name in "abc":
    ...     cache.put(name, 1, size=4)
    >>> cache.get("a"), cache.get("c"), cache.size
    (None, 1, 8)
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value or None; it counts as used."""
        with self._lock:
            entry = self._values.get(key)
            if entry is None:
                return None
            self._values.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Store a value of `size` bytes, unless it is larger than the whole cache."""
        with self._lock:
            if key in self._values:
                self.size -= self._values.pop(key)[1]
            if size > self.limit:
                return
            self._values[key] = value, size
            self.size += size
            while self.size > self.limit:
                self.size -= self._values.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._values)
