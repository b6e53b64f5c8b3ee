"""kubectl as a user has it, with answers as Python objects and failures that say what was run."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
Manifests = list[Manifest]


class CommandError(AssertionError):
    """A command ended with another exit status than it should; the message holds its output."""


def run(words: Sequence[str], *, stdin: str | None = None, timeout_s: float = 120.0, check: bool = True) -> str:
    """Run a command and return its standard output.

    Raises:
        CommandError: it failed, and `check` is set.
    """
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    if check and done.returncode != 0:
        shown = " ".join(words)
        raise CommandError(f"{shown}\nexit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


class Kubectl:
    """One cluster and one namespace."""

    def __init__(self, binary: Path, kubeconfig: Path, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace
        self._binary = binary

    def words(self, *words: str) -> list[str]:
        return [str(self._binary), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *words]

    def __call__(self, *words: str, stdin: str | None = None, timeout_s: float = 120.0, check: bool = True) -> str:
        return run(self.words(*words), stdin=stdin, timeout_s=timeout_s, check=check)

    def inside(self, namespace: str) -> "Kubectl":
        return Kubectl(self._binary, self.kubeconfig, namespace)

    def apply(self, *manifests: Manifest) -> str:
        return self("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def refuse(self, manifest: Manifest, *, dry_run: bool = True) -> str:
        """Apply what must be refused; return the API server's message."""
        words = self.words("apply", *(["--dry-run=server"] if dry_run else []), "-f", "-")
        done = subprocess.run(words, input=json.dumps(manifest), capture_output=True, text=True, check=False)
        assert done.returncode != 0, f"accepted: {manifest}"
        return done.stderr

    def get(self, kind: str, name: str) -> Manifest | None:
        """Return an object, or None if there is none of that name."""
        text = self("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, selector: str = "") -> Manifests:
        items: Manifests = json.loads(self("get", kind, "-o", "json", f"--selector={selector}"))["items"]
        return items

    def patch(self, kind: str, name: str, patch: Manifest) -> None:
        self("patch", kind, name, "--type=merge", "-p", json.dumps(patch))

    def llm(self, name: str) -> Manifest:
        found = self.get("llm", name)
        assert found is not None, f"there is no LLMDeployment {name}"
        return found

    def pods(self, name: str) -> Manifests:
        """Return the serving pods of an LLMDeployment that are not on their way out."""
        pods = self.list("pods", f"quire.dev/deployment={name},app.kubernetes.io/component=server")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def events(self) -> Manifests:
        return self.list("events")

    def describe_all(self) -> str:
        """What a person would look at when something went wrong."""
        parts = [
            self("get", "llm,deployments,jobs,pods,pvc,services", "-o", "wide", check=False),
            self("get", "llm", "-o", "yaml", check=False)[-6000:],
            self("get", "events", "--sort-by=.lastTimestamp", check=False)[-3000:],
        ]
        return "\n".join(parts)


def condition(llm: Manifest, kind: str) -> Manifest:
    """Return one condition of a status; an Unknown one where there is none yet."""
    conditions = (llm.get("status") or {}).get("conditions") or []
    empty = {"type": kind, "status": "Unknown", "reason": "", "message": ""}
    return next((one for one in conditions if one["type"] == kind), empty)


def is_true(llm: Manifest, kind: str) -> bool:
    return bool(condition(llm, kind)["status"] == "True")


def wait_for(
    what: str, check: Callable[[], Any], *, timeout_s: float, every_s: float = 0.5, describe: Callable[[], str] = str
) -> Any:
    """Call `check` until it returns something true, and return that.

    Raises:
        AssertionError: it did not in time; the message holds what `describe` says then.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{describe()}")
        time.sleep(every_s)
