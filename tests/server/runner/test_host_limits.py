"""Memory and CPU that a process may use, read from made-up machines."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quire_contract import environment
from quire_server.shared.host_limits import available_memory_bytes, usable_cpu_count

MIB = 1 << 20
Machine = Callable[[dict[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Write files of a machine with 8 GiB available; returns its root."""

    def build(files: dict[str, str]) -> Path:
        for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 << 20} kB\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def test_without_cgroups_the_machine_is_the_limit(machine: Machine) -> None:
    assert available_memory_bytes(machine({})) == 8 << 30


def test_a_parents_limit_counts_less_what_this_process_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.MEMORY_LIMIT, str(512 * MIB))
    pages = 100 * MIB // os.sysconf("SC_PAGE_SIZE")
    assert available_memory_bytes(machine({"proc/self/statm": f"999999 {pages} 1 1 0 1 0\n"})) == 412 * MIB


def test_a_parents_cpu_limit_is_rounded_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv(environment.CPU_LIMIT, "1.5")
    assert usable_cpu_count(machine({})) == 2


def test_cgroup_v2_counts_what_is_in_use_but_not_the_page_cache(machine: Machine) -> None:
    group = "sys/fs/cgroup/pods/a"
    root = machine(
        {
            "proc/self/cgroup": "0::/pods/a\n",
            f"{group}/memory.max": f"{1000 * MIB}\n",
            f"{group}/memory.current": f"{600 * MIB}\n",
            f"{group}/memory.stat": f"anon {250 * MIB}\nfile {350 * MIB}\nshmem {50 * MIB}\n",
        }
    )
    assert available_memory_bytes(root) == (1000 - (600 - 300)) * MIB


def test_cgroup_v2_limit_of_a_parent_counts(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "0::/pods/a\n",
            "sys/fs/cgroup/pods/a/memory.max": "max\n",
            "sys/fs/cgroup/pods/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/pods/memory.current": "0\n",
        }
    )
    assert available_memory_bytes(root) == 512 * MIB


def test_cgroup_v1_in_a_container_whose_path_is_the_hosts(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "4:memory:/kubepods/pod1/c1\n3:cpu,cpuacct:/kubepods/pod1/c1\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2000 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{900 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_cache {800 * MIB}\ntotal_shmem 0\n",
        }
    )
    assert available_memory_bytes(root) == 1900 * MIB


def test_cgroup_v1_without_limit(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert available_memory_bytes(root) == 8 << 30


def test_more_in_use_than_allowed_leaves_nothing(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "100\n",
            "sys/fs/cgroup/memory.current": "200\n",
        }
    )
    assert available_memory_bytes(root) == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 6),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu:/b\n",
                "sys/fs/cgroup/cpu/b/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/b/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/b\n",
                "sys/fs/cgroup/cpu/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/b/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
    ],
)
def test_cpu_count(machine: Machine, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(6)))
    assert usable_cpu_count(machine(files)) == expected


def test_this_machine_is_readable() -> None:
    assert available_memory_bytes() > 0
    assert usable_cpu_count() >= 1
