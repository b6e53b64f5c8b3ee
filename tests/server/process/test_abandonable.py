import asyncio
import subprocess
import sys
import threading

import pytest

from quire_server.shared.abandonable import leave, run_abandonable

LEAVING = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
from quire_server.shared.abandonable import leave, run_abandonable

async def main():
    is_running = threading.Event()
    def download():  # as the Hub library does, with an executor of its own
        with ThreadPoolExecutor() as executor:
            executor.submit(is_running.set)
            executor.submit(threading.Event().wait).result()
    task = asyncio.create_task(run_abandonable(download))
    await asyncio.to_thread(is_running.wait)
    task.cancel()

asyncio.run(main())
print("told")
sys.exit(leave(3))
"""


def test_the_result_or_the_error_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert asyncio.run(run_abandonable(lambda: 7)) == 7
    with pytest.raises(KeyError):
        asyncio.run(run_abandonable(fail))


def test_work_that_goes_on_does_not_hold_up_the_end() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "told\n", "")


def test_without_such_work_the_end_is_an_ordinary_one() -> None:
    assert leave(3) == 3


def test_an_end_after_the_cancellation_is_heard_by_nobody() -> None:
    may_end = threading.Event()

    async def story() -> None:
        task = asyncio.create_task(run_abandonable(lambda: may_end.wait(10)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_end.set()

    asyncio.run(story())
