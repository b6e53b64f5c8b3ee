"""Which architectures there are. A new family is a new file in `families/` and a line here."""

from collections.abc import Mapping
from typing import Any

from quire_server.models.families import gemma, gpt_neox, llama, mistral, opt, qwen2, qwen3
from quire_server.models.planning.linear_method import select_method_for
from quire_server.models.planning.parts import StoredLookup, nothing_stored
from quire_server.models.planning.plan import ModelPlan, build_plan
from quire_server.models.planning.weight_map import Family, spellings
from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.stored import StoredTensor

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "LLaMAForCausalLM": llama.FAMILY,
    "YiForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "GemmaForCausalLM": gemma.GEMMA,
    "Gemma2ForCausalLM": gemma.GEMMA2,
    "OPTForCausalLM": opt.FAMILY,
    "GPTNeoXForCausalLM": gpt_neox.FAMILY,
}


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a config. Raises CheckpointError, UnsupportedModelError listing what is supported."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list | tuple) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(
            f"The model's config is not usable: 'architectures' is {architectures!r}, no list of names."
        )
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    named = ", ".join(architectures) or f"none (model_type {config.get('model_type')!r})"
    raise UnsupportedModelError(
        f"The model's architecture is {named}; supported are {', '.join(sorted(FAMILIES))}.",
        hint="Choose a model of a supported architecture.",
    )


def plan_model(config: Mapping[str, Any], stored: StoredLookup = nothing_stored) -> ModelPlan:
    """Plan the model of a config: its spec, and all tensors with their bytes. Torch-free.

    Args:
        stored: what a checkpoint has under a name (`weights.checkpoint.lookup_in`), for methods that depend on it.

    Raises UnsupportedModelError, CheckpointError.
    """
    family = find_family(config)
    weights = family.build_weights(config)

    def find(name: str) -> StoredTensor | None:
        return next(filter(None, map(stored, spellings(name, weights.aliases))), None)

    knows_files = stored is not nothing_stored
    return build_plan(
        family.build_spec(config), weights, select_method_for(config), find if knows_files else nothing_stored
    )
