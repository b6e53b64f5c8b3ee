"""All the tasks that some code has started, and those that they have started: to end them with it.

kopf leaves its watches running when it ends by an error of one of them, and its own remedy is to cancel every task of
the process. A `TaskFamily` knows which are kopf's: a task inherits the context of the task that starts it. Knows no
kopf.
"""

import asyncio
import weakref
from collections.abc import Coroutine, Generator
from contextvars import ContextVar
from typing import Any

_family: ContextVar["TaskFamily | None"] = ContextVar("_family", default=None)


class TaskFamily:
    """The descendants of the task that called `adopt`."""

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def adopt(self) -> None:
        """From now on, what the current task and its descendants start is of the family; the task itself is not."""
        asyncio.get_running_loop().set_task_factory(_start_task)
        _family.set(self)

    async def end(self, timeout_s: float) -> int:
        """Cancel all that still run, those that start meanwhile too; return how many go on nevertheless."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while (alive := self._alive()) and loop.time() < deadline:
            for task in alive:
                task.cancel()
            await asyncio.wait(alive, timeout=min(0.5, timeout_s))
        return len(self._alive())

    def _alive(self) -> list[asyncio.Task[Any]]:
        return [task for task in self._tasks if not task.done() and task is not asyncio.current_task()]

    def _add(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)


def _start_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any], /, **options: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    family = _family.get()
    if family is not None:
        family._add(task)
    return task
