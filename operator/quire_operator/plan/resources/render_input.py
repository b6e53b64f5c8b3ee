"""What the builders of child objects are given: all decisions are made, only documents remain to be written."""

from dataclasses import dataclass

from quire_contract.model_facts import ModelFacts
from quire_operator.plan.hardware import Hardware
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.settings import Settings
from quire_operator.watch.cluster import ClusterFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderInput:
    deployment: LLMDeployment
    settings: Settings
    cluster: ClusterFacts
    hardware: Hardware
    claim: str | None
    """Name of the PersistentVolumeClaim that holds the model; None for oci://, which is mounted as an image."""
    facts: ModelFacts | None
    """None for oci://."""
    access_modes: tuple[str, ...] = ()
    """Of the claim; empty: it is still to be made, with what the spec asks for."""
    replicas: int
    load_budget_s: float
    """How long a pod may take from its start to ready."""
    target_pending_per_replica: int
