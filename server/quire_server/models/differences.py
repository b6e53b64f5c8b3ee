"""What a checkpoint stores and nothing reads, and where it and its config disagree: sentences for the log, bounded.

Pure. The plan has decided already (`planning/`); here is only said what a person may want to know of it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from quire_server.models.planning.plan import ModelPlan
from quire_server.models.planning.weight_map import spellings
from quire_server.models.registry import plan_model
from quire_server.weights.checkpoint import Checkpoint

_MAX_LISTED = 5
_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"  # tables that follow from the config
    r"|\.(attention|attn)\.(masked_)?bias$"  # causal masks (GPT-NeoX, GPT-2)
    r"|(^|\.)position_ids$"
)


def find_differences(plan: ModelPlan, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a sentence for each way in which a checkpoint holds other things than its config and its plan speak of."""
    planned = {tensor.name for _, tensor in plan.tensors()}
    promised = {tensor.name for _, tensor in plan_model(checkpoint.config).tensors()}
    topics = {
        "The checkpoint stores tensors that nothing reads": _unread(plan, checkpoint, planned),
        "The checkpoint stores tensors that its config denies; they are used": planned - promised,
        "The config promises tensors that the checkpoint does not store; the model runs without": promised - planned,
        "The file has metadata that is not known, and not followed": checkpoint.unknown_metadata,
    }
    for topic, names in topics.items():
        if names:
            yield f"{topic}: {_listed(names)}"


def _unread(plan: ModelPlan, checkpoint: Checkpoint, planned: Iterable[str]) -> set[str]:
    read = {spelling for name in planned for spelling in spellings(name, plan.weights.aliases)}
    if plan.lm_head is None:  # what is stored of a head is the embedding once more
        heads = (f"{module}.weight" for module in plan.weights.lm_head.modules)
        read |= {spelling for name in heads for spelling in spellings(name, plan.weights.aliases)}
    return {name for name in checkpoint.tensor_names if name not in read and not _HARMLESS.search(name)}


def _listed(names: Iterable[str]) -> str:
    """Name the first few; layers that are alike count as one."""
    pattern_to_count = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in sorted(names))
    listed = [f"{name} ({count} times)" if count > 1 else name for name, count in pattern_to_count.items()]
    more = len(listed) - _MAX_LISTED
    return ", ".join(listed[:_MAX_LISTED]) + (f", and {more} more" if more > 0 else "")
