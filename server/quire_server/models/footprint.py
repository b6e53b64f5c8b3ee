"""What a model takes of memory, as numbers (`ModelShape`): summed over the tensors of its plan.

Asked by the server before it loads, and by the download Job, whose answer goes to the operator: one family, one plan,
one arithmetic. Pure, and imports no torch; what depends on dtype and devices is `quire_contract.fit`'s.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quire_contract.model_shape import FitError, LayerWeights, ModelShape, WeightShare
from quire_server.errors import CheckpointError, UnsupportedModelError
from quire_server.models.kv_cache_spec import build_kv_cache_groups
from quire_server.models.plan import ModelPlan, build_plan
from quire_server.models.plan_tensors import PlacedTensor, placed_tensors
from quire_server.models.registry import find_family
from quire_server.models.spec import DecoderSpec
from quire_server.weights.checkpoint import Checkpoint

_UNUSABLE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What comes of a config that has something else where a number should be."""


def read_model_shape(checkpoint: Checkpoint) -> ModelShape:
    """Return the shape of what lies in a checkpoint.

    Raises:
        FitError: no family knows it, or its config is not usable.
    """
    try:
        shape = shape_of_config(checkpoint.config)
    except (UnsupportedModelError, CheckpointError) as error:
        raise FitError(str(error)) from error
    except _UNUSABLE as error:
        raise FitError(f"the model's config is not usable: {error}") from error
    return replace(shape, checkpoint_dtype=checkpoint.default_dtype)


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a model with this config.

    Raises UnsupportedModelError, CheckpointError: as loading it would.
    """
    family = find_family(config)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        name = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModelError(f"The checkpoint is quantised with {name!r}, which is not supported.")
    spec = family.build_spec(config)
    try:
        return build_model_shape(spec, build_plan(spec, family.weights))
    except FitError as error:
        raise UnsupportedModelError(f"The model's config is not usable: {error}.") from error


def build_model_shape(spec: DecoderSpec, plan: ModelPlan) -> ModelShape:
    """Sum up a plan."""
    tensors = list(placed_tensors(spec, plan))
    first = [tensor for tensor in tensors if tensor.place == "first"]
    last = [tensor for tensor in tensors if tensor.place == "last"]
    tied = [tensor for tensor in first if tensor.name == f"{plan.token_embedding.module}.weight"]
    return ModelShape(
        architecture=spec.architecture,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        activation_width=_activation_width(spec),
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        layer_weights=_layer_weights(tensors),
        first_weights=_shares(first),
        last_weights=_shares(last),
        tied_weights=_shares(tied) if plan.lm_head is None else (),
        kv_groups=build_kv_cache_groups(spec),
    )


def _activation_width(spec: DecoderSpec) -> int:
    attention, mlp = spec.attention, spec.mlp
    qkv_width = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
    return max(2 * qkv_width, mlp.intermediate_size * (3 if mlp.is_gated else 2))


def _layer_weights(tensors: Iterable[PlacedTensor]) -> tuple[LayerWeights, ...]:
    """Return the weights of each kind of layer, in the order of their first ones."""
    layer_to_tensors: dict[int, list[PlacedTensor]] = {}
    for tensor in tensors:
        if isinstance(tensor.place, int):
            layer_to_tensors.setdefault(tensor.place, []).append(tensor)
    shares_to_layers: dict[tuple[WeightShare, ...], list[int]] = {}
    for layer, parts in sorted(layer_to_tensors.items()):
        shares_to_layers.setdefault(_shares(parts), []).append(layer)
    return tuple(LayerWeights(layers=tuple(layers), shares=shares) for shares, layers in shares_to_layers.items())


def _shares(tensors: Iterable[PlacedTensor]) -> tuple[WeightShare, ...]:
    """Join the tensors that devices divide alike. What a tensor takes is linear in the bytes of an element."""
    elements: Counter[int] = Counter()
    fixed_bytes: Counter[int] = Counter()
    for tensor in tensors:
        fixed = tensor.loaded_bytes(0)
        fixed_bytes[tensor.num_pieces] += fixed
        elements[tensor.num_pieces] += tensor.loaded_bytes(1) - fixed
    return tuple(
        WeightShare(num_elements=elements[pieces], num_bytes=fixed_bytes[pieces], num_pieces=pieces)
        for pieces in sorted(elements)
    )
