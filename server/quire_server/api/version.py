"""Which release this is, and what must be equal for equal seeds to give equal answers."""

import functools
import hashlib
import importlib.metadata

from quire_server.frontend.frontend import Frontend


@functools.cache
def server_version() -> str:
    return importlib.metadata.version("quire")


def system_fingerprint(frontend: Frontend) -> str:
    """Name release, model, precision and device in one short word."""
    info = frontend.client.info
    parts = (server_version(), str(frontend.config.engine.model.path), *((info.dtype, info.device) if info else ()))
    return f"fp_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"
