"""A setting of an object that several threads use at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedSetting(Generic[T]):
    """Lets threads that want the same value go on together; those that want another one wait until none is left."""

    def __init__(self, change: Callable[[T], None], value: T) -> None:
        """Begin with a value; `change` sets it, and is called while nobody uses it."""
        change(value)
        self._change, self._value, self._users = change, value, 0
        self._left = threading.Condition()

    @contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Keep the setting at a value as long as the block runs."""
        with self._left:
            self._left.wait_for(lambda: not self._users or self._value == value)
            if self._value != value:
                self._change(value)
                self._value = value
            self._users += 1
        try:
            yield
        finally:
            with self._left:
                self._users -= 1
                self._left.notify_all()
