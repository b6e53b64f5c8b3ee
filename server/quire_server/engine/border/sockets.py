"""The API process's ends of the bridge: what is sent goes out in order and is never lost, and nobody waits for it.

ZeroMQ takes no message while no peer is connected, and an engine may have said that it is ready before its other socket
is: what is sent meanwhile is kept here, and goes out as soon as it can. Lives on one event loop.
"""

import asyncio
from collections import deque

import zmq
import zmq.asyncio

from quire_server.engine.border.launch import EngineProcess

_RETRY_S = 0.005


class Sockets:
    """`send` for messages to the engine, `receive` for those from it."""

    def __init__(self, process: EngineProcess) -> None:
        self._context = zmq.asyncio.Context()
        self._receiver = self._context.socket(zmq.PULL)
        self._receiver.set_hwm(0)
        self._receiver.bind(process.from_engine)
        self._sender: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        self._sender.set_hwm(0)
        self._sender.bind(process.to_engine)
        self._unsent: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None

    def send(self, message: bytes) -> None:
        self._unsent.append(message)
        if self._retry is None:
            self._flush()

    async def receive(self) -> bytes:
        message: bytes = await self._receiver.recv()
        return message

    def close(self) -> None:
        """Close both ends. What has not gone out yet never will."""
        if self._retry is not None:
            self._retry.cancel()
        self._sender.close(linger=0)
        self._receiver.close(linger=0)
        self._context.destroy(linger=0)

    def _flush(self) -> None:
        self._retry = None
        while self._unsent:
            try:
                self._sender.send(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:  # no peer: not yet connected, or gone, which the exit watch is about to say
                self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._flush)
                return
            self._unsent.popleft()
