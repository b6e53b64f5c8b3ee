"""Quire's inference server: HTTP front, engine, models, loaders, and `LLM` for offline use.

Importing this package is cheap; `LLM` brings torch with it and is loaded when it is first named.
"""

from typing import TYPE_CHECKING, Any

from quire_server.shared.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quire_server.offline.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from quire_server.offline.llm import LLM

        return LLM
    raise AttributeError(f"module 'quire_server' has no attribute {name!r}")
