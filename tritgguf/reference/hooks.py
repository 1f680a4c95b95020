"""Hooks on a module of torch that read or replace hidden states, as context managers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def capture_input(module: Any, capture: Callable[[Any], Any]) -> Iterator[None]:
    """Call a function with the hidden states that a layer receives."""

    def hook(module: Any, arguments: Any, settings: Any) -> None:
        capture(arguments[0] if arguments else settings["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_input(module: Any, hidden: Any) -> Iterator[None]:
    """Replace the hidden states that a layer receives."""

    def hook(module: Any, arguments: Any, settings: Any) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), settings
        return arguments, {**settings, "hidden_states": hidden}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_output(module: Any, capture: Callable[[Any], Any]) -> Iterator[None]:
    """Call a function with the hidden states that a layer returns."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        capture(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
