"""What the operator knows of the cluster around it, apart from any one LLMDeployment."""

from dataclasses import dataclass

from quire_kube.objects import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """Found by discovery, and found again every so often."""

    kinds: frozenset[Kind] = frozenset()
    """Which of `OPTIONAL_KINDS` the cluster has."""
    version: tuple[int, int] = (1, 34)
    """Kubernetes' major and minor version."""
    has_default_storage_class: bool | None = None
    """None: not known, because the operator may not read StorageClasses."""
    storage_classes: tuple[str, ...] = ()
    """All that are known, sorted: to name them to who has named another."""
    expandable_storage_classes: frozenset[str] = frozenset()
    """Those that let a claim grow."""
    is_openshift: bool = False
    """Its admission assigns every pod a user (SecurityContextConstraints)."""
    operator_namespace: str = "quire-system"

    def has(self, kind: Kind) -> bool:
        return kind in self.kinds
