"""The phases of a server's life, as `/readyz` names them and the operator and gateway read them."""

from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """Where a server is between start and end."""

    STARTING = "Starting"
    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    WARMING_UP = "WarmingUp"
    READY = "Ready"
    DRAINING = "Draining"
    FAILED = "Failed"


class Readiness(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of `/readyz`: 200 when `phase` is Ready, 503 otherwise."""

    phase: Phase
    message: str = ""
    percent: float | None = None
    """Progress within the phase, 0 to 100, where it is known."""
    eta_seconds: float | None = None
