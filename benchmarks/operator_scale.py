"""A thousand LLMDeployments on a real API server without nodes: how fast, how large and how quiet the operator is.

Measures, with `quire operator` as a process of its own and with RBAC as nobody but itself:

* from the operator's start until every child exists and every status is written. The limit is the machine's CPU, which
  the API server, etcd and the operator share: what each took of it is noted;
* the operator's resident memory, before and after a restart;
* from a change of a spec to the write that it causes: 200 changes, one at a time;
* calls to the API server in quiet seconds, and calls that write after a restart.

Calls are counted from the API server's audit log, not from what the operator says of itself. No node runs a download
Job, so the volumes say from the start that their models are there; and no node runs a server, so this program makes the
pods that the Deployments ask for and says that they are ready, as controllers and kubelets would.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import common
import yaml
from scale_cluster import NAMESPACES, OPERATOR_USER, Api, connect, llm_path, populate, run_pods

from quire_contract import names

sys.path.insert(0, str(common.ROOT / "e2e"))
from cluster.control_plane import ControlPlane, api_server_only

WRITES = {"create", "update", "patch", "delete", "deletecollection"}
SETTLED_S = 5.0
CHILDREN_PER_OBJECT = {
    "/apis/apps/v1/deployments": 1,
    "/api/v1/services": 2,
    "/api/v1/serviceaccounts": 1,
    "/apis/policy/v1/poddisruptionbudgets": 1,
    "/apis/networking.k8s.io/v1/networkpolicies": 1,
}


@contextmanager
def operator(plane: ControlPlane, kubeconfig: Path) -> Iterator[int]:
    """Run `quire operator`; yield its process id."""
    folder = plane.directory
    settings = folder / "operator.yaml"
    settings.write_text(yaml.safe_dump({}))
    log = (folder / "operator.log").open("ab")
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": "default"}
    words = ["-m", "quire_cli", "operator", "--config", str(settings)]
    words += ["--health-port", "0", "--metrics-port", "0"]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *words],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)],
    )
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        log.close()


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds(plane: ControlPlane, operator_pid: int) -> dict[str, float]:
    """Return what each process has used of the CPU since it began."""
    services = {"api server": plane.api_server.find(), "etcd": plane.etcd.find()}
    pids = {name: record.pid for name, record in services.items() if record} | {"operator": operator_pid}
    used = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return {**used, "benchmark": time.process_time()}


def calls(plane: ControlPlane, since: int) -> tuple[Counter[str], int]:
    """Count the operator's calls after byte `since` of the audit log, by verb; return also the log's size now."""
    counted: Counter[str] = Counter()
    with plane.audit_log.open("rb") as log:
        log.seek(since)
        text = log.read()
    end = text.rfind(b"\n") + 1
    for line in text[:end].splitlines():
        entry = json.loads(line)
        reference = entry.get("objectRef") or {}
        if entry["user"]["username"] == OPERATOR_USER and reference.get("resource") != "leases":
            counted[entry["verb"]] += entry["stage"] == "ResponseComplete" or entry["verb"] == "watch"
    return counted, since + end


async def wait_all(api: Api, count: int) -> None:
    """Return when every child exists and every status is written. Looks seldom: it costs what the operator needs."""
    while True:
        await asyncio.sleep(1.0)
        if await api.count_with(f"/apis/{names.GROUP_VERSION}/{names.PLURAL}", "Phase") >= count:
            found = [len(await api.items(path)) >= count * each for path, each in CHILDREN_PER_OBJECT.items()]
            if all(found):
                return


async def change_latencies(api: Api, count: int, num_changes: int) -> list[float]:
    """Seconds from the API server's answer to a change until the operator's write of its Deployment is seen."""
    latencies = []
    async with api.watch("/apis/apps/v1/deployments") as events:
        seen: dict[str, int] = {}
        arrived = asyncio.Condition()

        async def read() -> None:
            async for line in events:
                event = json.loads(line)
                assert event["type"] != "ERROR", event
                found = event["object"]
                key = f"{found['metadata'].get('namespace')}/{found['metadata'].get('name')}"
                async with arrived:
                    seen[key] = found["metadata"].get("generation", 0)
                    arrived.notify_all()

        reader = asyncio.create_task(read())
        async with arrived:
            await asyncio.wait_for(arrived.wait_for(lambda: len(seen) >= count), 60)
        for number in range(num_changes):
            index = number * 7919 % count
            key = f"scale-{index % NAMESPACES}/llm-{index}"
            before = seen[key]
            patch = {"spec": {"engine": {"maxNumSeqs": 65 + number}}}
            await api.patch(llm_path(f"scale-{index % NAMESPACES}", f"llm-{index}"), patch)
            started = time.perf_counter()
            async with arrived:
                await asyncio.wait_for(arrived.wait_for(lambda key=key, before=before: seen[key] > before), 60)
            latencies.append(time.perf_counter() - started)
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
    return latencies


async def wait_quiet(plane: ControlPlane, since: int) -> int:
    """Return the size of the audit log once the operator has made no call for a while."""
    while True:
        _, before = calls(plane, since)
        await asyncio.sleep(SETTLED_S)
        counted, since = calls(plane, before)
        if not counted.total():
            return since


def report(stage: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}", file=sys.stderr, flush=True)


async def measure(count: int, num_changes: int, quiet_s: float) -> tuple[list[common.Row], dict[str, Any]]:
    with api_server_only(audit=True) as plane:
        async with connect(plane) as api:
            kubeconfig = plane.create_service_account("default", names.FIELD_MANAGER)
            await populate(api, plane, count)
            with operator(plane, kubeconfig) as pid:
                started, cpu_before = time.perf_counter(), cpu_seconds(plane, pid)
                await wait_all(api, count)
                all_s = time.perf_counter() - started
                cpu_s = {name: used - cpu_before[name] for name, used in cpu_seconds(plane, pid).items()}
                report(f"all is there after {all_s:.1f} s")
                await run_pods(api)
                mark = await wait_quiet(plane, 0)
                memory_mb = resident_mb(pid)
                first_calls, _ = calls(plane, 0)
                report("pods are ready, the operator is quiet")
                latencies = await change_latencies(api, count, num_changes)
                report("changes are made")
                await run_pods(api)
                mark = await wait_quiet(plane, mark)
                report("the operator is quiet")
                await asyncio.sleep(quiet_s)
                quiet_calls, mark = calls(plane, mark)
                memory_mb = max(memory_mb, resident_mb(pid))
            restarted_at = mark
            report("restart")
            with operator(plane, kubeconfig) as pid:
                await asyncio.sleep(20)
                await wait_quiet(plane, mark)
                restart_calls, _ = calls(plane, restarted_at)
                restart_mb = resident_mb(pid)
    p95_s = sorted(latencies)[int(0.95 * len(latencies))]
    rows = [
        dataclasses.replace(
            common.row("all children and statuses", "quire", "s", [all_s], count=count),
            limit_share=sum(cpu_s.values()) / (all_s * (os.cpu_count() or 1)),
        ),
        common.row("change to write", "quire", "s", latencies, count=count, p95=round(p95_s, 4)),
        common.row("resident memory", "quire", "MB", [memory_mb], count=count),
        common.row("resident memory after a restart", "quire", "MB", [restart_mb], count=count),
        common.row("calls while quiet", "quire", "calls", [float(quiet_calls.total())], seconds=quiet_s),
        common.row("writes after a restart", "quire", "calls", [float(writes(restart_calls))], count=count),
    ]
    return rows, {
        "cpu_ms_per_object": {name: round(1e3 * used / count, 1) for name, used in cpu_s.items()},
        "first_calls": dict(first_calls),
        "quiet_calls": dict(quiet_calls),
        "restart_calls": dict(restart_calls),
    }


def writes(counted: Counter[str]) -> int:
    return sum(number for verb, number in counted.items() if verb in WRITES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--quiet-seconds", type=float, default=60.0)
    common.add_output_argument(parser)
    arguments = parser.parse_args()
    rows, notes = asyncio.run(measure(arguments.count, arguments.changes, arguments.quiet_seconds))
    for each in rows:
        p95 = f", p95 {each.parameters['p95']:.3f}" if "p95" in each.parameters else ""
        print(f"{each.what:34} {each.p50:9.3f} {each.unit}{p95}")
    print(json.dumps(notes))
    common.finish("operator_scale", rows, save=arguments.save, **notes)


if __name__ == "__main__":
    main()
