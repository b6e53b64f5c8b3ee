"""A person's hold on one LLMDeployment: the annotation `quire.dev/paused: "true"`.

While it is there the operator goes on looking and telling, and writes nothing but the status: no child is made, healed,
scaled or pruned, no download started and no volume grown. What somebody mends by hand stays so until it is taken away.
"""

from dataclasses import replace
from typing import Final

from quire_contract.names import ANNOTATION_PAUSED
from quire_kube.objects import Manifest, annotation_of
from quire_operator.plan.actions import Plan

_PAUSED: Final = "true"


def is_paused(manifest: Manifest) -> bool:
    return annotation_of(manifest, ANNOTATION_PAUSED) == _PAUSED


def withhold(plan: Plan) -> Plan:
    """Return the plan with the same answers and nothing to do."""
    return replace(plan, actions=(), is_paused=True, num_withheld=len(plan.actions), needs_loads=False)
