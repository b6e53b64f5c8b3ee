"""Environment variables by which one process limits another, or gives it a secret."""

from typing import Final

CPU_LIMIT: Final = "QUIRE_CPU_LIMIT"
"""CPUs that a server may use, such as 1.5, where no cgroup says so."""

MEMORY_LIMIT: Final = "QUIRE_MEMORY_LIMIT"
"""Bytes that a server's weights, workspace and KV cache may take together, where no cgroup says so."""

HF_TOKEN: Final = "HF_TOKEN"
"""Token for hf://: the Hub library's own name."""

HTTP_TOKEN: Final = "QUIRE_HTTP_TOKEN"
"""Bearer token for http(s)://; a name of its own, so that a token of the Hub is sent to no other host."""
