"""Environment variables by which one process limits another."""

from typing import Final

CPU_LIMIT: Final = "QUIRE_CPU_LIMIT"
"""CPUs that a server may use, such as 1.5, where no cgroup says so."""

MEMORY_LIMIT: Final = "QUIRE_MEMORY_LIMIT"
"""Bytes that a server's weights, workspace and KV cache may take together, where no cgroup says so."""
