"""What the gateway is told about models and replicas, and the seam it is told through.

`Backends` has two makers: a static one, fed by `quire up`, and a Kubernetes watch, which comes with the operator.
The gateway only reads; it never decides how many replicas there are.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from quire_contract.phases import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A replica that is ready to answer."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One LLMDeployment as the gateway sees it. Each change is another object, so that identity is its version."""

    namespace: str
    name: str
    served_names: tuple[str, ...]
    backends: tuple[Backend, ...] = ()
    """Ready replicas; empty while the model is cold."""
    phase: Phase = Phase.STARTING
    status: str = ""
    """Why it is not ready, for a person; empty when it is."""
    eta_seconds: float | None = None
    is_suspended: bool = False
    cold_start: Literal["Hold", "Reject"] = "Hold"
    cold_start_timeout_s: float = 900.0
    max_queue: int = 256
    heartbeat_s: float = 10.0

    @property
    def key(self) -> str:
        return key_of(self.namespace, self.name)


def key_of(namespace: str, name: str) -> str:
    return f"{namespace}/{name}"


class Backends(Protocol):
    """The models there are. Reads never block, and none but `models` depends on how many there are."""

    def models(self) -> tuple[Model, ...]:
        """Return all, the oldest first."""
        ...

    def get(self, key: str) -> Model | None: ...

    def named(self, name: str) -> tuple[Model, ...]:
        """Return the models of this `metadata.name`, one from each namespace that has it."""
        ...

    def serving(self, served_name: str) -> tuple[Model, ...]:
        """Return the models that answer to this name in a request."""
        ...

    async def changed(self, key: str, seen: Model | None) -> None:
        """Return as soon as `get(key)` is another object than `seen`: at once where it has become so already."""
        ...


class StaticBackends:
    """Backends that somebody in this process sets. Used on one event loop only."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._named: dict[str, dict[str, Model]] = {}
        self._serving: dict[str, dict[str, Model]] = {}
        self._changes: dict[str, asyncio.Event] = {}
        """For each key that somebody waits for; set and gone at its next change."""

    def models(self) -> tuple[Model, ...]:
        return tuple(self._models.values())

    def get(self, key: str) -> Model | None:
        return self._models.get(key)

    def named(self, name: str) -> tuple[Model, ...]:
        return tuple(self._named.get(name, {}).values())

    def serving(self, served_name: str) -> tuple[Model, ...]:
        return tuple(self._serving.get(served_name, {}).values())

    async def changed(self, key: str, seen: Model | None) -> None:
        while self._models.get(key) is seen:
            await self._changes.setdefault(key, asyncio.Event()).wait()

    def set(self, model: Model) -> None:
        old = self._models.get(model.key)
        if old == model:
            return
        if old is not None:
            self._drop_from_indexes(old)
        self._models[model.key] = model
        for index, name in self._index_entries(model):
            index.setdefault(name, {})[model.key] = model
        self._notify(model.key)

    def remove(self, key: str) -> None:
        old = self._models.pop(key, None)
        if old is not None:
            self._drop_from_indexes(old)
            self._notify(key)

    def _index_entries(self, model: Model) -> Iterator[tuple[dict[str, dict[str, Model]], str]]:
        yield self._named, model.name
        for name in model.served_names:
            yield self._serving, name

    def _drop_from_indexes(self, model: Model) -> None:
        for index, name in self._index_entries(model):
            index[name].pop(model.key, None)
            if not index[name]:
                del index[name]

    def _notify(self, key: str) -> None:
        change = self._changes.pop(key, None)
        if change is not None:
            change.set()
