"""The calls that the engine has not answered yet, and who waits for them. Owned by the client; knows no sockets.

Invariant: each call ends once: with its reply, an error in place of it, its caller's timeout, or its caller's end.
What comes after is dropped.
"""

import asyncio
import itertools
from collections.abc import Callable

import msgspec

from quire_server.engine.border.calls import Call, EngineMethod, R, Reply
from quire_server.shared.errors import InternalError, QuireError, UnavailableError, decode_error


class OpenCalls:
    """Sends calls and brings their replies to those who wait."""

    def __init__(self, send: Callable[[Call], None]) -> None:
        self._send = send
        self._call_ids = itertools.count()
        self._open: dict[int, asyncio.Future[msgspec.Raw]] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, method: EngineMethod[R], timeout_s: float) -> R:
        """Send a call and wait for its reply.

        Raises:
            UnavailableError: there is none after `timeout_s`; the engine may still do it.
            InternalError: the engine answered with something that is no result of this method.
            QuireError: what the engine answered, or `fail` was given.
        """
        call_id = next(self._call_ids)
        answer = self._open[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Call(call_id=call_id, method=method))  # type: ignore[arg-type]  # every method is in the union
            async with asyncio.timeout(timeout_s):
                result = await answer
        except TimeoutError:
            name = type(method).__name__
            raise UnavailableError(f"The engine has not answered {name} for {timeout_s:g} s.") from None
        finally:
            del self._open[call_id]
        try:
            answered: R = msgspec.msgpack.decode(result, type=method.result_type)
        except msgspec.DecodeError as error:
            message = f"The engine's answer to {type(method).__name__} is not what it must be."
            raise InternalError(message) from error
        return answered

    def settle(self, reply: Reply) -> None:
        """Take what the engine says of a call."""
        answer = self._open.get(reply.call_id)
        if answer is None or answer.done():
            return  # its caller is gone
        if reply.error is None:
            answer.set_result(reply.result)
        else:
            answer.set_exception(decode_error(reply.error))

    def fail(self, make_error: Callable[[], QuireError]) -> None:
        """End every open call with an error of its own."""
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(make_error())
