"""The promise of Ready, held to while all stories run: whoever asks while it says True is answered.

Asks through the API server, which leads to a Service's endpoints as the API knows them: no client pod is needed, and no
rule of a node's kube-proxy is waited for. A moment is allowed for, in which a pod has died and nobody knows it yet.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from support.kubectl import CommandError, Kubectl, Manifest, condition, is_true

PATIENCE_S = 10.0
_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Ready said True all the while, and nobody was answered."""

    namespace: str
    name: str
    error: str


class ReadyPromise:
    """Asks every LLMDeployment that says Ready, over and over, from a thread of its own."""

    def __init__(self, kubectl: Kubectl) -> None:
        self.num_answered = 0
        self._kubectl = kubectl
        self._failing_since: dict[str, float] = {}
        self._broken: dict[str, Broken] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ready-promise", daemon=True)
        self._thread.start()

    def broken_in(self, namespace: str) -> list[Broken]:
        return [broken for broken in self._broken.values() if broken.namespace == namespace]

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_PAUSE_S):
            try:
                found: list[Manifest] = json.loads(self._kubectl("get", "llm", "-A", "-o", "json"))["items"]
            except CommandError:  # a story has stopped the API server
                self._failing_since.clear()
                continue
            self._hold(list(_serving(found)))

    def _hold(self, llms: list[Manifest]) -> None:
        uids = {llm["metadata"]["uid"] for llm in llms}
        self._failing_since = {uid: since for uid, since in self._failing_since.items() if uid in uids}
        for llm in llms:
            uid, error = llm["metadata"]["uid"], self._ask(llm)
            if not error:
                self._failing_since.pop(uid, None)
                self.num_answered += 1
            elif time.monotonic() - self._failing_since.setdefault(uid, time.monotonic()) > PATIENCE_S:
                namespace, name = llm["metadata"]["namespace"], llm["metadata"]["name"]
                self._broken[uid] = Broken(namespace=namespace, name=name, error=error)

    def _ask(self, llm: Manifest) -> str:
        """Ask for one token; return why there was none."""
        namespace, name = llm["metadata"]["namespace"], llm["metadata"]["name"]
        path = f"/api/v1/namespaces/{namespace}/services/http:{name}:http/proxy/v1/completions"
        body = json.dumps({"prompt": "Hello", "max_tokens": 1})
        try:
            answer = json.loads(self._kubectl("create", "--raw", path, "-f", "-", stdin=body, timeout_s=30))
        except CommandError as error:
            return str(error)
        return "" if answer.get("choices") else f"no choices: {answer}"


def _serving(llms: list[Manifest]) -> Iterator[Manifest]:
    """Yield those whose pods are said to answer; asleep behind a gateway, only the gateway does."""
    for llm in llms:
        is_going = "deletionTimestamp" in llm["metadata"]
        if is_true(llm, "Ready") and condition(llm, "Ready")["reason"] != "ScaledToZero" and not is_going:
            yield llm
