"""The workload where one replica spans several pods: a leader, which answers, and workers, which compute with it.

The controller of LeaderWorkerSets puts LWS_GROUP_SIZE, LWS_WORKER_INDEX and LWS_LEADER_ADDRESS before a container's own
variables; the kubelet expands them in the arguments.
"""

from typing import Final

from quire_contract import names, ports
from quire_kube.objects import Manifest
from quire_operator.plan.hardware import pods_per_replica
from quire_operator.plan.resources.child import build_child, whole_seconds
from quire_operator.plan.resources.render_input import RenderInput
from quire_operator.plan.resources.workload.pod import build_pod_template
from quire_operator.spec.kinds import LEADER_WORKER_SET

_GROUP_ARGUMENTS: Final = (
    *("--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", "$(LWS_WORKER_INDEX)"),
    *("--master-addr", "$(LWS_LEADER_ADDRESS)", "--master-port", str(ports.SERVER_RENDEZVOUS)),
)


def build_leader_worker_set(given: RenderInput) -> Manifest:
    """Build the LeaderWorkerSet, without its revision.

    Raises:
        SpecError: `spec.podTemplate` cannot be merged.
    """
    deployment = given.deployment
    is_surge = deployment.spec.rollout.strategy == "Surge"
    return build_child(
        given,
        LEADER_WORKER_SET,
        names.workload_name(deployment.name),
        annotations={names.ANNOTATION_LOAD_BUDGET: str(whole_seconds(given.load_budget_s))},
        spec={
            "replicas": given.replicas,
            "startupPolicy": "LeaderCreated",
            # By default the controller wants a headless Service of the set's name, and our own Service has that name:
            # the leader's address would lead nowhere.
            "networkConfig": {"subdomainPolicy": "UniquePerReplica"},
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxSurge": int(is_surge), "maxUnavailable": int(not is_surge)},
            },
            "leaderWorkerTemplate": {
                "size": pods_per_replica(deployment, given.hardware),
                # The collective operations of a group do not survive the loss of a member.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": build_pod_template(given, extra_arguments=_GROUP_ARGUMENTS),
                "workerTemplate": build_pod_template(
                    given, extra_arguments=(*_GROUP_ARGUMENTS, "--headless"), is_answering=False
                ),
            },
        },
    )
