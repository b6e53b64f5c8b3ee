"""Pods as a scheduler, a kubelet and a registry describe them, and the one line that a user reads."""

from typing import Any

import pytest
from status_objects import build_condition

from quire_contract.termination import TerminationMessage, encode_termination
from quire_operator.status.pod_reasons import find_pod_problem, find_restart_cause, last_line
from quire_operator.status.reasons import Stage
from quire_operator.watch.observed import WarningEvent

GIB = 1 << 30
IMAGE = "registry.example/quire/server-cpu:1.2.0"
TRACEBACK = """INFO 2026-11-21 11:00:00 Loading
Traceback (most recent call last):
  File "/usr/lib/python3.11/site-packages/quire_server/__main__.py", line 12, in <module>
    main()
  File "/usr/lib/python3.11/site-packages/quire_server/cli.py", line 40, in main
    raise ValueError("max_num_seqs must be at least 1")
ValueError: max_num_seqs must be at least 1
"""
CHAINED = (
    TRACEBACK
    + """
During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 1, in <module>
RuntimeError: the engine did not start:
  see above
"""
)


def _pod(
    *statuses: dict[str, Any],
    scheduled: str | None = None,
    phase: str = "Pending",
    ready: bool = False,
    init: tuple[dict[str, Any], ...] = (),
    **metadata: Any,
) -> dict[str, Any]:
    """Build a pod; `scheduled` is the scheduler's complaint."""
    placed = build_condition("PodScheduled", "True")
    if scheduled is not None:
        placed = build_condition("PodScheduled", "False", "Unschedulable", scheduled)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "smollm2-7d9c5b6f4d-x2k8p", "namespace": "ai", "uid": "u1", **metadata},
        "spec": {
            "nodeName": None if scheduled is not None else "node-1",
            "containers": [{"name": "server", "image": IMAGE, "resources": {"limits": {"memory": "2Gi"}}}],
        },
        "status": {
            "phase": phase,
            "conditions": [placed, build_condition("Ready", "True" if ready else "False")],
            "initContainerStatuses": list(init),
            "containerStatuses": list(statuses),
        },
    }


def _container(
    *, waiting: str = "", message: str = "", ended: dict[str, Any] | None = None, last: Any = None, restarts: int = 0
) -> dict[str, Any]:
    state: dict[str, Any] = {"running": {"startedAt": "2026-11-21T11:00:05Z"}}
    if waiting:
        state = {"waiting": {"reason": waiting, "message": message}}
    if ended is not None:
        state = {"terminated": ended}
    return {
        "name": "server",
        "image": IMAGE,
        "ready": False,
        "restartCount": restarts,
        "state": state,
        "lastState": {"terminated": last} if last is not None else {},
    }


def _end(message: str = "", *, reason: str = "Error", exit_code: int = 1) -> dict[str, Any]:
    return {"exitCode": exit_code, "reason": reason, "message": message, "startedAt": "2026-11-21T11:00:05Z"}


def _said(**fields: Any) -> str:
    return encode_termination(TerminationMessage(**{"stage": "Loading", "message": "", **fields})).decode()


def _line(pod: dict[str, Any], *warnings: WarningEvent) -> str | None:
    found = find_pod_problem(pod, warnings)
    return None if found is None else found.line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available: "
            "1 No preemption victims found for incoming pod.",
            "InsufficientGPU: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
        ),
        (
            "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 Insufficient memory. no new claims to "
            "deallocate, preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling.",
            "InsufficientGPU: 0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 Insufficient memory",
        ),
        (
            "0/1 nodes are available: 1 Insufficient memory.",
            "InsufficientMemory: 0/1 nodes are available: 1 Insufficient memory",
        ),
        (
            "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint "
            "{node-role.kubernetes.io/control-plane: }.",
            "InsufficientCPU: 0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint "
            "{node-role.kubernetes.io/control-plane: }",
        ),
        (
            "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }.",
            "UntoleratedTaint: 0/1 nodes are available: 1 node(s) had untolerated taint "
            "{node.kubernetes.io/not-ready: }",
        ),
        (
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            "NoMatchingNode: 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector",
        ),
        (
            "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
            "VolumeNotBound: 0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
        ),
        (
            "0/1 nodes are available: 1 node(s) had volume node affinity conflict.",
            "VolumeNodeConflict: 0/1 nodes are available: 1 node(s) had volume node affinity conflict",
        ),
        ("no nodes available to schedule pods", "NoNodes: no nodes available to schedule pods"),
        ("0/1 nodes are available: 1 Too many pods.", "TooManyPods: 0/1 nodes are available: 1 Too many pods"),
        ("0/1 nodes are available: 1 weird.", "Unschedulable: 0/1 nodes are available: 1 weird"),
    ],
)
def test_the_scheduler_s_complaint(message: str, line: str) -> None:
    found = find_pod_problem(_pod(scheduled=message), ())
    assert found is not None
    assert (found.line, found.stage) == (line, Stage.SCHEDULING)


PULL = f'failed to resolve reference "{IMAGE}": {IMAGE}: not found'


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "ErrImagePull",
            f'rpc error: code = NotFound desc = failed to pull and unpack image "{IMAGE}": {PULL}',
        ),
        (
            "ImagePullBackOff",
            f'Back-off pulling image "{IMAGE}": ErrImagePull: rpc error: code = NotFound desc = failed to pull and '
            f'unpack image "{IMAGE}": {PULL}',
        ),
    ],
)
def test_an_image_that_is_not_there_reads_the_same_on_every_try(reason: str, message: str) -> None:
    pod = _pod(_container(waiting=reason, message=message))
    assert _line(pod) == f"ImagePullBackOff: {IMAGE}: {IMAGE}: not found"


@pytest.mark.parametrize(
    ("pod", "line"),
    [
        (
            _pod(_container(waiting="ImagePullBackOff", message=f'Back-off pulling image "{IMAGE}"')),
            f"ImagePullBackOff: {IMAGE}: cannot be pulled",
        ),
        (
            _pod(_container(waiting="InvalidImageName", message='couldn\'t parse image name "A b"')),
            f'InvalidImageName: {IMAGE}: couldn\'t parse image name "A b"',
        ),
        (
            _pod(_container(waiting="CreateContainerConfigError", message='secret "hf" not found')),
            'CreateContainerConfigError: secret "hf" not found',
        ),
        (
            _pod(_container(waiting="CreateContainerError", message="failed to generate spec: no command specified")),
            "CreateContainerError: failed to generate spec: no command specified",
        ),
        (
            _pod(_container(waiting="RunContainerError", message="")),
            "RunContainerError: container server cannot be started",
        ),
        (
            _pod(_container(ended=_end(TRACEBACK))),
            "Crashed: ValueError: max_num_seqs must be at least 1",
        ),
        (
            _pod(
                _container(
                    waiting="CrashLoopBackOff",
                    message="back-off 40s restarting failed container=server pod=smollm2-7d9c5b6f4d-x2k8p_ai(u1)",
                    last=_end(TRACEBACK),
                    restarts=1,
                )
            ),
            "CrashLoop: ValueError: max_num_seqs must be at least 1",
        ),
        (
            _pod(_container(last=_end(CHAINED), restarts=3), phase="Running"),
            "CrashLoop: RuntimeError: the engine did not start:",
        ),
        (
            _pod(_container(last=_end("", exit_code=137), restarts=1), phase="Running"),
            "Crashed: killed (SIGKILL) without a word; its log may say why",
        ),
        (
            _pod(_container(ended=_end("", exit_code=0, reason="Completed")), phase="Running"),
            "Crashed: ended with exit code 0 without a word; its log may say why",
        ),
        (
            _pod(_container(last=_end("", reason="OOMKilled", exit_code=137), restarts=1), phase="Running"),
            "OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory",
        ),
        (
            _pod(
                _container(
                    ended=_end(
                        _said(code="EngineKilled", message="The engine process was killed."),
                        reason="OOMKilled",
                        exit_code=1,
                    )
                )
            ),
            "OutOfMemory: killed at its limit of 2 GiB; raise resources.limits.memory",
        ),
        (
            _pod(
                _container(
                    waiting="CrashLoopBackOff",
                    last=_end(
                        _said(
                            code="OutOfMemory",
                            message="The weights need more.",
                            need_bytes=int(17.1 * GIB),
                            have_bytes=15 * GIB,
                        )
                    ),
                    restarts=4,
                )
            ),
            "OutOfMemory: needs 17.1 GiB, has 15.0 GiB",
        ),
        (
            _pod(
                _container(
                    ended=_end(_said(code="BadCheckpoint", message="model.safetensors is cut.", hint="Download it."))
                )
            ),
            "BadCheckpoint: model.safetensors is cut; download it.",
        ),
        (
            _pod(
                phase="Failed",
            )
            | {
                "status": {
                    "phase": "Failed",
                    "reason": "Evicted",
                    "message": "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. ",
                }
            },
            "Evicted: The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi.",
        ),
        (
            _pod() | {"status": {"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": "Node didn't have it"}},
            "OutOfnvidiacomgpu: Node didn't have it",
        ),
    ],
)
def test_a_container_that_does_not_run(pod: dict[str, Any], line: str) -> None:
    assert _line(pod) == line


@pytest.mark.parametrize(
    "pod",
    [
        _pod(),
        _pod(_container(waiting="ContainerCreating")),
        _pod(_container(waiting="PodInitializing"), init=(_container() | {"ready": False},)),
        _pod(_container(), phase="Running"),
        _pod(_container(last=_end(TRACEBACK), restarts=1), phase="Running", ready=True),
        _pod(_container(ended=_end(TRACEBACK)), deletionTimestamp="2026-11-21T11:00:00Z"),
        _pod(
            _container(),
            init=(_container(ended=_end("", exit_code=0, reason="Completed")) | {"name": "prepare", "ready": True},),
        ),
        {"metadata": {"name": "new"}},
    ],
    ids=["scheduled", "creating", "initializing", "running", "ready again", "ending", "init done", "empty"],
)
def test_nothing_is_wrong(pod: dict[str, Any]) -> None:
    assert _line(pod) is None


def test_a_download_pod_that_succeeded_is_no_problem() -> None:
    pod = _pod(_container(ended=_end("{}", exit_code=0, reason="Completed")), phase="Succeeded")
    pod["spec"]["restartPolicy"] = "Never"
    assert _line(pod) is None


def test_a_volume_that_is_not_mounted_is_told_only_while_the_pod_waits() -> None:
    warning = WarningEvent(
        kind="Pod",
        name="smollm2-7d9c5b6f4d-x2k8p",
        reason="FailedMount",
        message='MountVolume.SetUp failed for volume "models" : rpc error: timed out',
        time=2.0,
    )
    other = WarningEvent(kind="Pod", name="other", reason="FailedMount", message="not this", time=3.0)
    waiting = _pod(_container(waiting="ContainerCreating"))
    assert _line(waiting, warning, other) == f"FailedMount: {warning.message}"
    assert _line(_pod(_container(), phase="Running"), warning) is None


def test_the_cause_of_a_restart_is_remembered_when_the_pod_is_ready_again() -> None:
    pod = _pod(_container(last=_end("", reason="OOMKilled"), restarts=1), ready=True, phase="Running")
    found = find_restart_cause(pod, ())
    assert found is not None
    assert found.reason == "OutOfMemory"
    assert find_restart_cause(_pod(_container(), phase="Running", ready=True), ()) is None


@pytest.mark.parametrize("init", [True, False])
def test_who_was_restarted_is_named_where_it_is_not_the_server(init: bool) -> None:
    proxy = _container(last=_end("", exit_code=3), restarts=1) | {"name": "proxy"}
    server = _container()
    pod = _pod(server, init=(proxy,), ready=True) if init else _pod(server, proxy, ready=True)
    found = find_restart_cause(pod, ())
    assert found is not None
    assert found.detail.startswith(f"{'init ' if init else ''}container proxy: ended with exit code 3")


def test_the_worst_container_is_told() -> None:
    pod = _pod(
        _container(waiting="ImagePullBackOff", message="x") | {"name": "sidecar"}, _container(ended=_end(TRACEBACK))
    )
    assert (_line(pod) or "").startswith("Crashed")


def test_a_container_that_is_ready_again_is_not_what_keeps_its_pod_from_ready() -> None:
    recovered = _container(last=_end(TRACEBACK), restarts=1) | {"ready": True}
    sidecar = _container(waiting="CreateContainerError", message="no command specified") | {"name": "sidecar"}
    assert _line(_pod(recovered, sidecar)) == "CreateContainerError: container sidecar: no command specified"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        (" \n\t\n", ""),
        ("one\ntwo\n", "two"),
        (TRACEBACK + "INFO shutting down\n", "ValueError: max_num_seqs must be at least 1"),
        (CHAINED, "RuntimeError: the engine did not start:"),
        ("torch.OutOfMemoryError: CUDA out of memory\n[W1] warning", "torch.OutOfMemoryError: CUDA out of memory"),
        ("Traceback (most recent call last):\n  File x", "File x"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
    ],
)
def test_the_last_line_that_says_something(text: str, line: str) -> None:
    assert last_line(text) == line
