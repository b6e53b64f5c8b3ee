"""What this process may use of its machine: memory and CPU, under cgroups (v1 or v2), affinity and its parent's limits.

Only reads files and the environment; decides nothing. Functions take the filesystem's root for tests' sake.
"""

import math
import os
from pathlib import Path

from quire_contract import environment

_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes "no limit" as a number a little below 2^63."""


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: what the machine has free, or what its cgroups leave, if less."""
    candidates = [_mem_available_bytes(root)]
    if given := os.environ.get(environment.MEMORY_LIMIT):
        candidates.append(max(int(given) - _resident_bytes(root), 0))
    for directory in _cgroup_directories(root, "memory"):
        limit = _first_number(directory, "memory.max", "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED_BYTES:
            candidates.append(max(limit - _unreclaimable_bytes(directory), 0))
    return min(candidates)


def usable_cpu_count(root: Path = Path("/")) -> int:
    """CPUs worth a thread: the affinity mask's, or the CFS quota's, rounded up, if fewer."""
    candidates = [len(os.sched_getaffinity(0))]
    if given := os.environ.get(environment.CPU_LIMIT):
        candidates.append(max(math.ceil(float(given)), 1))
    for directory in _cgroup_directories(root, "cpu"):
        quota = _cpu_quota(directory)
        if quota is not None:
            candidates.append(max(math.ceil(quota), 1))
    return min(candidates)


def _mem_available_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")


def _resident_bytes(root: Path) -> int:
    """Memory that this process has already taken."""
    return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_directories(root: Path, controller: str) -> list[Path]:
    """The controller's directories of this process, from the leaf up: any of them may carry the limit.

    Inside a container the path of /proc/self/cgroup may be the host's, where only the mount's root is visible.
    """
    mount = root / "sys/fs/cgroup"
    directories: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        leaf = base / path.lstrip("/")
        directories += [each for each in (leaf, *leaf.parents) if each == base or base in each.parents]
    return [each for each in dict.fromkeys(directories) if each.is_dir()]


def _unreclaimable_bytes(directory: Path) -> int:
    """The cgroup's usage less its page cache, which the kernel gives up before it kills."""
    usage = _first_number(directory, "memory.current", "memory.usage_in_bytes") or 0
    try:
        pairs = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return usage
    is_v1 = "total_cache" in stat
    cache = stat.get("total_cache" if is_v1 else "file", 0)
    shared = stat.get("total_shmem" if is_v1 else "shmem", 0)
    return max(usage - max(cache - shared, 0), 0)


def _cpu_quota(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us = _first_number(directory, "cpu.cfs_quota_us")
    period_us = _first_number(directory, "cpu.cfs_period_us")
    return quota_us / period_us if quota_us is not None and quota_us > 0 and period_us else None


def _first_number(directory: Path, *names: str) -> int | None:
    for name in names:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
