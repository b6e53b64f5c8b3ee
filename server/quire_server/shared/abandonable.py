"""Blocking work that this process may leave behind: a download cannot be interrupted, and must not hold up the end.

Executors do not do: the event loop and the interpreter both wait for their threads, those of the Hub library included.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

T = TypeVar("T")

THREAD_NAME: Final = "abandonable"


async def run_abandonable(work: Callable[[], T]) -> T:
    """Await `work` in a thread of its own. Where the caller is cancelled, it runs on, and nobody hears of its end."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # from here on a cancelled caller does not touch it

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - as in an executor, it is the caller's
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return await asyncio.wrap_future(outcome)


def leave(exit_code: int) -> int:
    """Return the exit code; where abandoned work still runs, end the process here, without waiting for it."""
    if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code
