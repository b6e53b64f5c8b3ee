"""What the gateway is told about models and replicas, and the seam it is told through.

`Backends` has two makers: a static one, fed by `quire up`, and a Kubernetes watch, which comes with the operator.
The gateway only reads; it never decides how many replicas there are.
"""

import asyncio
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
    """One LLMDeployment as the gateway sees it."""

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
        return f"{self.namespace}/{self.name}"


class Backends(Protocol):
    """The models there are. Reads never block; `changed` wakes those who wait for a replica."""

    def models(self) -> tuple[Model, ...]: ...

    def get(self, key: str) -> Model | None: ...

    async def changed(self) -> None:
        """Return after the next change."""
        ...


class StaticBackends:
    """Backends that somebody in this process sets. Used on one event loop only."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._change = asyncio.Event()

    def models(self) -> tuple[Model, ...]:
        return tuple(self._models.values())

    def get(self, key: str) -> Model | None:
        return self._models.get(key)

    async def changed(self) -> None:
        await self._change.wait()

    def set(self, model: Model) -> None:
        if self._models.get(model.key) != model:
            self._models[model.key] = model
            self._notify()

    def remove(self, key: str) -> None:
        if self._models.pop(key, None) is not None:
            self._notify()

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
