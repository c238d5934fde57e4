"""Signals that ask a long run to stop."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, so that the step under way can end; a second one acts at once.

    Except SIGHUP: when a terminal is closed it may come from the kernel and from the shell, so after the first it is
    ignored. What our parent has us ignore, as nohup does with SIGHUP, stays ignored.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if number != signal.SIGHUP:
            signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            gone = number == signal.SIGHUP and number in received
            signal.signal(number, signal.SIG_IGN if gone else handler)
