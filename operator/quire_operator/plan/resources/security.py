"""Security of every pod that the operator makes: what Pod Security's `restricted` profile asks for, and more.

The user id is a number, so that `runAsNonRoot` can be checked without the image; an admission controller that assigns
another one (OpenShift) may do so, because nothing of ours depends on the id.
"""

from typing import Final

from quire_kube.objects import Manifest

USER_ID: Final = 65532


def pod_security_context() -> Manifest:
    """Return the security context of a pod. The group owns the files of volumes."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
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
