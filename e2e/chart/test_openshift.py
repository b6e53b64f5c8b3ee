"""Where the platform assigns users, no pod of the release names one, and the operator is told what was said."""

from types import ModuleType
from typing import Any

import pytest
import yaml

from quire_operator.spec.settings import parse_settings

API = ("--api-versions", "security.openshift.io/v1")
GATEWAY = ("--set", "gateway.enabled=true")


def render(rendering: ModuleType, *flags: str) -> tuple[list[dict[str, Any]], bool | None]:
    """Return the security contexts of the pods, and the operator's setting."""
    documents = list(yaml.safe_load_all(rendering.render(*GATEWAY, *flags)))
    contexts = [one["spec"]["template"]["spec"]["securityContext"] for one in documents if one["kind"] == "Deployment"]
    (text,) = [one["data"]["operator.yaml"] for one in documents if "operator.yaml" in one.get("data", {})]
    assert len(contexts) == 2
    return contexts, parse_settings(yaml.safe_load(text)).openshift


@pytest.mark.parametrize(
    ("flags", "is_assigned", "setting"),
    [
        ((), False, None),
        (API, True, None),
        (("--set", "openshift=true"), True, True),
        ((*API, "--set", "openshift=false"), False, False),
    ],
)
def test_users_are_named_where_nobody_assigns_them(
    rendering: ModuleType, flags: tuple[str, ...], is_assigned: bool, setting: bool | None
) -> None:
    contexts, told = render(rendering, *flags)
    assert told is setting
    for context in contexts:
        assert context["runAsNonRoot"] is True
        named = {"runAsUser", "runAsGroup", "fsGroup"} & context.keys()
        assert named == (set() if is_assigned else {"runAsUser", "runAsGroup", "fsGroup"})
