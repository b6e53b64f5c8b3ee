"""The bounded queue in front of a cold model: a request waits here until a replica is ready, or time is up."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from quire_gateway import errors
from quire_gateway.backends import Backends, Model
from quire_gateway.demand import DemandTable

SHORTEST_RETRY_AFTER_S = 1
DEFAULT_RETRY_AFTER_S = 10


def retry_after(model: Model) -> int:
    """Whole seconds until it is worth asking again: the time the model still needs, where that is known."""
    eta = model.eta_seconds
    return DEFAULT_RETRY_AFTER_S if eta is None else max(SHORTEST_RETRY_AFTER_S, round(eta))


class Holder:
    """Holds requests for cold models. Invariant: `waiting` of a model counts exactly the open `hold` calls for it."""

    def __init__(self, backends: Backends, demands: DemandTable) -> None:
        self._backends = backends
        self._demands = demands

    def admit(self, model: Model) -> None:
        """Refuse a request that must not or cannot wait.

        Raises:
            GatewayError: suspended, cold with `coldStart: Reject`, or the queue is full.
        """
        if model.is_suspended:
            raise errors.model_suspended(model.name)
        if model.backends:
            return
        if model.cold_start == "Reject":
            # The refusal is still demand: the model wakes for the retry.
            self._demands[model.key].lease(asyncio.get_running_loop().time())
            raise errors.model_loading(model.name, model.status or model.phase, retry_after(model))
        waiting = self._demands[model.key].waiting
        if waiting >= model.max_queue:
            raise errors.queue_full(model.name, waiting, retry_after(model))

    async def hold(self, key: str) -> AsyncGenerator[Model]:
        """Yield the model at once and at every heartbeat while it is cold; end when a replica is ready.

        Close the iterator (`contextlib.aclosing`) to leave the queue.

        Raises:
            GatewayError: it was suspended or deleted meanwhile, or `coldStartTimeout` has passed.
        """
        loop = asyncio.get_running_loop()
        demand = self._demands[key]
        demand.waiting += 1
        demand.touch(loop.time())
        is_served = False
        try:
            started = next_beat = loop.time()
            while not (model := self._current(key)).backends:
                left = started + model.cold_start_timeout_s - loop.time()
                if left <= 0:
                    raise errors.model_loading(model.name, model.status or model.phase, retry_after(model))
                if loop.time() >= next_beat:
                    next_beat = loop.time() + model.heartbeat_s
                    demand.touch(loop.time())
                    yield model
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, next_beat - loop.time())):
                        await self._backends.changed()
            is_served = True
        finally:
            demand.waiting -= 1
            if not is_served:
                demand.lease(loop.time())

    def _current(self, key: str) -> Model:
        model = self._backends.get(key)
        if model is None:
            raise errors.model_not_found(key)
        if model.is_suspended:
            raise errors.model_suspended(model.name)
        return model
