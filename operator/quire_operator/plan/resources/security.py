"""Security of every pod that the operator makes: what Pod Security's `restricted` profile asks for, and more.

The user id is a number, so that `runAsNonRoot` can be checked without the image. Nothing of ours depends on it; where
the platform assigns users (OpenShift's `restricted-v2`), a pod that insists on one is refused, so there none is named.
"""

from typing import Final

from quire_kube.objects import Manifest
from quire_operator.spec.settings import Settings

USER_ID: Final = 65532


def pod_security_context(settings: Settings) -> Manifest:
    """Return the security context of a pod. The group owns the files of volumes."""
    ids = {} if settings.openshift else dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), USER_ID)
    return {
        "runAsNonRoot": True,
        **ids,
        # A cache holds tens of gigabytes in few files, yet a recursive chown at each start would still be waited for.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security_context() -> Manifest:
    """Return the security context of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
