"""kubectl, bound to one kubeconfig: the way in which this tool speaks to an API server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.shell import ClusterError, run


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """Run kubectl with one kubeconfig. Every method raises ClusterError where kubectl fails."""

    binary: Path
    kubeconfig: Path

    def __call__(self, *arguments: str, text_input: str | None = None, timeout_s: float = 60.0) -> str:
        """Run kubectl and return what it prints."""
        command: list[str | Path] = [self.binary, "--kubeconfig", self.kubeconfig, *arguments]
        return run(command, text_input=text_input, timeout_s=timeout_s)

    def apply(self, objects: Sequence[dict[str, Any]]) -> None:
        """Apply objects by server-side apply."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self("apply", "--server-side", "--force-conflicts", "-f", "-", text_input=text)

    def answers(self, *arguments: str) -> bool:
        """Tell whether kubectl succeeds within a few seconds."""
        try:
            self(*arguments, "--request-timeout=2s", timeout_s=5)
        except ClusterError:
            return False
        return True
