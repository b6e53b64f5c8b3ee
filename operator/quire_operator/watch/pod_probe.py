"""Asks pods directly, over HTTP by their address: how far a download is, what a server waits for, how busy it is.

`PodProbe` asks; answers are kept for a moment, so that a reconcile and the loop do not ask twice. `ProbeLoop` asks
again every few seconds whatever pods there are to ask, and enqueues the keys of those whose answer changed. A pod that
does not answer is left out; nothing here raises for its sake. Knows no plan and no store.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import aiohttp
import msgspec

from quire_contract import names, paths, ports
from quire_contract.metrics import NUM_REQUESTS_RUNNING, NUM_REQUESTS_WAITING
from quire_contract.model_facts import DownloadProgress
from quire_contract.nesting import bounded_nesting
from quire_contract.phases import Readiness
from quire_kube.objects import Manifest, label_of
from quire_operator.watch.pods import can_answer, is_ready

logger = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 3.0
_FRESH_S: Final = POLL_INTERVAL_S - 0.5
_TIMEOUT: Final = aiohttp.ClientTimeout(total=2.0)
_MAX_CONCURRENT: Final = 32
_MAX_BODY_BYTES: Final = 4 << 20
_LOAD_SERIES: Final = (NUM_REQUESTS_RUNNING.name.encode(), NUM_REQUESTS_WAITING.name.encode())

Answer = Readiness | DownloadProgress
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    answer: Answer | None
    at: float


class PodProbe:
    """The asking. Made inside the event loop; closed by `close`."""

    def __init__(self, server_port: int = ports.SERVER_HTTP, progress_port: int = ports.DOWNLOAD_PROGRESS) -> None:
        self._session = aiohttp.ClientSession(
            timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=_MAX_CONCURRENT, force_close=True), trust_env=False
        )
        self._server_port = server_port
        self._progress_port = progress_port
        self._heard: dict[str, _Heard] = {}

    async def close(self) -> None:
        await self._session.close()

    async def fetch_readiness(self, pods: Sequence[Manifest]) -> Mapping[str, Readiness]:
        """Ask serving pods how far they are; by pod name."""
        answers = await asyncio.gather(*(self._hear(pod, self._ask_readiness) for pod in pods))
        return {_name(pod): got for pod, got in zip(pods, answers, strict=True) if isinstance(got, Readiness)}

    async def fetch_progress(self, pod: Manifest) -> DownloadProgress | None:
        """Ask a download how far it is."""
        answer = await self._hear(pod, self._ask_progress)
        return answer if isinstance(answer, DownloadProgress) else None

    async def fetch_loads(self, pods: Sequence[Manifest]) -> Mapping[str, int]:
        """Ask serving pods for their requests, running and waiting; by pod name. Always asked anew."""
        bodies = await asyncio.gather(*(self._get(pod, self._server_port, paths.METRICS, (200,)) for pod in pods))
        loads = {_name(pod): parse_load(body) for pod, body in zip(pods, bodies, strict=True) if body is not None}
        return {name: load for name, load in loads.items() if load is not None}

    async def ask_again(self, pod: Manifest) -> bool:
        """Ask whatever this pod is to be asked; return whether the answer is another than before."""
        before = self._heard.pop(_uid(pod), None)
        await self._hear(pod, self._ask_progress if is_download(pod) else self._ask_readiness)
        return before is None or before.answer != self._heard[_uid(pod)].answer

    def forget(self, pod: Manifest) -> None:
        """Drop what is known of a pod."""
        self._heard.pop(_uid(pod), None)

    async def _hear(self, pod: Manifest, ask: Callable[[Manifest], Awaitable[Answer | None]]) -> Answer | None:
        heard = self._heard.get(_uid(pod))
        if heard is None or time.monotonic() > heard.at + _FRESH_S:
            answer = await ask(pod)
            self._heard[_uid(pod)] = heard = _Heard(answer=answer, at=time.monotonic())
        return heard.answer

    async def _ask_readiness(self, pod: Manifest) -> Readiness | None:
        return _decode(await self._get(pod, self._server_port, paths.READYZ, (200, 503)), Readiness)

    async def _ask_progress(self, pod: Manifest) -> DownloadProgress | None:
        return _decode(await self._get(pod, self._progress_port, paths.PROGRESS, (200,)), DownloadProgress)

    async def _get(self, pod: Manifest, port: int, path: str, statuses: tuple[int, ...]) -> bytes | None:
        address = (pod.get("status") or {}).get("podIP")
        if not address:
            return None
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{port}{path}", allow_redirects=False) as response:
                if response.status not in statuses:
                    return None
                return await response.content.read(_MAX_BODY_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.debug("Pod does not answer pod=%s path=%s err=%r", _name(pod), path, error)
            return None


class ProbeLoop:
    """Asks every pod that starts or downloads, again and again; told of pods by `saw_pod`."""

    def __init__(self, probe: PodProbe, enqueue_for: Callable[[Manifest], None], interval_s: float) -> None:
        self._probe = probe
        self._enqueue_for = enqueue_for
        self._interval_s = interval_s
        self._pods: dict[str, Manifest] = {}

    @property
    def num_pods(self) -> int:
        """How many pods are being asked."""
        return len(self._pods)

    def saw_pod(self, event_type: str, pod: Manifest) -> None:
        """Take note of one event of one of our pods."""
        uid = _uid(pod)
        if event_type != "DELETED" and is_to_be_asked(pod):
            self._pods[uid] = _essence(pod)
        elif self._pods.pop(uid, None) is not None:
            self._probe.forget(pod)

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            pods = tuple(self._pods.values())
            changes = await asyncio.gather(*(self._probe.ask_again(pod) for pod in pods))
            for pod, has_changed in zip(pods, changes, strict=True):
                if has_changed and _uid(pod) in self._pods:
                    self._enqueue_for(pod)


def is_download(pod: Manifest) -> bool:
    return label_of(pod, names.LABEL_COMPONENT) == names.COMPONENT_DOWNLOAD


def is_to_be_asked(pod: Manifest) -> bool:
    """Whether a pod runs, and downloads, or serves and is not ready yet."""
    if not can_answer(pod):
        return False
    if is_download(pod):
        return True
    return label_of(pod, names.LABEL_COMPONENT) == names.COMPONENT_SERVER and not is_ready(pod)


def parse_load(exposition: bytes) -> int | None:
    """Add up running and waiting requests in a server's metrics; None where they are not among them."""
    found = [_value(line) for line in exposition.splitlines() if line.partition(b"{")[0].split(b" ")[0] in _LOAD_SERIES]
    values = [value for value in found if value is not None]
    return round(sum(values)) if values else None


def _value(line: bytes) -> float | None:
    try:
        return float(line.rpartition(b"}")[2].split()[-1])
    except (ValueError, IndexError):
        return None


def _decode(body: bytes | None, answer_type: type[_T]) -> _T | None:
    if body is None:
        return None
    try:
        with bounded_nesting():
            return msgspec.json.decode(body, type=answer_type)
    except ValueError:
        return None


def _essence(pod: Manifest) -> Manifest:
    """Keep of a pod what asking it and finding its key take."""
    kept = ("name", "namespace", "uid", "labels", "ownerReferences")
    metadata = {name: pod["metadata"][name] for name in kept if name in pod["metadata"]}
    status = {"podIP": pod["status"]["podIP"]}
    return {"apiVersion": pod["apiVersion"], "kind": pod["kind"], "metadata": metadata, "status": status}


def _name(pod: Manifest) -> str:
    name: str = pod["metadata"]["name"]
    return name


def _uid(pod: Manifest) -> str:
    uid: str = pod["metadata"]["uid"]
    return uid
