"""Threads that share a setting."""

from __future__ import annotations

import threading

from tritgguf.tokenization.shared_setting import SharedSetting

MOST_SECONDS = 30.0


def test_the_same_value_is_used_at_once_and_another_waits() -> None:
    values = list[int]()
    setting = SharedSetting(values.append, 1)
    entered, another = threading.Event(), threading.Event()

    def use(value: int, event: threading.Event) -> None:
        with setting.use(value):
            event.set()

    with setting.use(1):
        same = threading.Thread(target=use, args=(1, entered))
        same.start()
        assert entered.wait(MOST_SECONDS)
        waiting = threading.Thread(target=use, args=(2, another))
        waiting.start()
        assert not another.wait(0.05)
        assert values == [1]
    assert another.wait(MOST_SECONDS)
    same.join()
    waiting.join()
    assert values == [1, 2]
