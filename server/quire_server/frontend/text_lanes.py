"""Where work is done whose length a client chooses: long texts off the event loop, and never without a bound.

Short work is done at once, because a thread's turn would cost more than the work. Long work goes to threads of its own,
and very long work to another one, so that what takes seconds does not stand before what takes milliseconds. What is
given here must let other threads run: Python code does, and so does `encode_batch_fast` of the tokenizers.
Invariants: as many works wait in a lane as its bound says, no more; work whose caller has gone is not begun, nor kept.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from quire_server.shared.errors import QueueFullError

T = TypeVar("T")

LONG_CHARS: Final = 4096
"""From here on work is done in a thread. Tokenising so many characters takes a few milliseconds."""
VERY_LONG_CHARS: Final = 256 * 1024
"""From here on it takes a good part of a second."""
CHARS_PER_TOKEN: Final = 4
"""Work on a token counts as work on so many characters."""
_RETRY_AFTER_S: Final = 1.0


class TextLanes:
    """The two lanes of one server. Of its event loop's thread alone."""

    def __init__(self, *, max_waiting: int) -> None:
        num_threads = min(4, max(2, (os.cpu_count() or 1) // 2))
        self._long = _Lane("long-texts", num_threads, max_waiting)
        self._very_long = _Lane("very-long-texts", 1, max_waiting)

    @property
    def num_waiting(self) -> int:
        """How many works are waited for, those that are being done included."""
        return self._long.num_open + self._very_long.num_open

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Return what `work` does about so many characters.

        Raises:
            QueueFullError: too much of the kind waits already.
        """
        if num_chars < LONG_CHARS:
            return work()
        return await (self._long if num_chars < VERY_LONG_CHARS else self._very_long).run(work)


class _Lane:
    """A few threads, and a bound on what waits for them."""

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._max_open = num_threads + max_waiting
        self.num_open = 0

    async def run(self, work: Callable[[], T]) -> T:
        if self.num_open >= self._max_open:
            raise QueueFullError("Too many long texts wait to be read; try again later.", _RETRY_AFTER_S)
        self.num_open += 1
        held = [work]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: held.pop()())
        finally:
            held.clear()  # what was given up stays in the executor's queue until its turn; its text must not
            self.num_open -= 1
