"""What a model takes of memory, as numbers (`ModelShape`): summed over the tensors of its plan.

Asked by the server before it loads, and by the download Job, whose answer goes to the operator: one family, one plan,
one arithmetic. Pure, and imports no torch; what depends on dtype and devices is `quire_contract.memory.fit`'s.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quire_contract.memory.model_shape import FitError, LayerShares, ModelShape, WeightShare
from quire_server.models.planning.kv_cache_spec import build_kv_cache_groups
from quire_server.models.planning.parts import StoredLookup, TensorPlan, nothing_stored
from quire_server.models.planning.plan import ModelPlan
from quire_server.models.registry import plan_model
from quire_server.shared.errors import CheckpointError, UnsupportedModelError
from quire_server.weights.checkpoint import Checkpoint, lookup_in


def read_model_shape(checkpoint: Checkpoint) -> ModelShape:
    """Return the shape of what lies in a checkpoint, which may be anything.

    Raises:
        FitError: no family knows it, or its config is not usable.
    """
    try:
        return shape_of_checkpoint(checkpoint)
    except (UnsupportedModelError, CheckpointError) as error:
        raise FitError(str(error)) from error


def shape_of_checkpoint(checkpoint: Checkpoint) -> ModelShape:
    """Return the shape of what lies in a checkpoint.

    Raises UnsupportedModelError, CheckpointError: as loading it would.
    """
    return shape_of_plan(plan_model(checkpoint.config, lookup_in(checkpoint)), checkpoint.default_dtype)


def shape_of_config(config: Mapping[str, Any], stored: StoredLookup = nothing_stored) -> ModelShape:
    """Return the shape of a model with this config.

    Raises UnsupportedModelError, CheckpointError: as loading it would.
    """
    return shape_of_plan(plan_model(config, stored))


def shape_of_plan(plan: ModelPlan, checkpoint_dtype: str | None = None) -> ModelShape:
    """Return the shape of what is planned. Raises UnsupportedModelError."""
    try:
        return replace(build_model_shape(plan), checkpoint_dtype=checkpoint_dtype)
    except FitError as error:
        raise UnsupportedModelError(f"The model's config is not usable: {error}.") from error


def build_model_shape(plan: ModelPlan) -> ModelShape:
    """Sum up a plan."""
    spec, tensors = plan.spec, list(plan.tensors())
    halves = [half for layer in spec.layers for half in (layer.attention, layer.feed_forward)]
    return ModelShape(
        architecture=spec.architecture,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        activation_width=max((half.activation_width for half in halves), default=0),
        num_parameters=sum(tensor.num_elements for _, tensor in tensors),
        layer_weights=_layer_weights(plan),
        first_weights=_shares(tensor for place, tensor in tensors if place == "first"),
        last_weights=_shares(tensor for place, tensor in tensors if place == "last"),
        tied_weights=_shares(plan.token_embedding.tensors()) if plan.lm_head is None else (),
        kv_groups=build_kv_cache_groups(spec),
    )


def _layer_weights(plan: ModelPlan) -> tuple[LayerShares, ...]:
    """Return the weights of each kind of layer, in the order of their first ones."""
    shares_to_layers: dict[tuple[WeightShare, ...], list[int]] = {}
    for index, layer in enumerate(plan.layers):
        shares = _shares(tensor for part in layer.parts() for tensor in part.tensors())
        shares_to_layers.setdefault(shares, []).append(index)
    return tuple(LayerShares(layers=tuple(layers), shares=shares) for shares, layers in shares_to_layers.items())


def _shares(tensors: Iterable[TensorPlan]) -> tuple[WeightShare, ...]:
    """Join what devices divide alike. What a tensor takes is linear in the bytes of an element."""
    num_elements: Counter[tuple[int, bool]] = Counter()
    num_bytes: Counter[tuple[int, bool]] = Counter()
    for tensor in tensors:
        for fixed, with_one_byte in zip(tensor.pieces(0), tensor.pieces(1), strict=True):
            how = (fixed.num_pieces, fixed.can_replicate)
            num_elements[how] += with_one_byte.num_bytes - fixed.num_bytes
            num_bytes[how] += fixed.num_bytes
    return tuple(
        WeightShare(num_elements=num_elements[how], num_bytes=num_bytes[how], num_pieces=how[0], can_replicate=how[1])
        for how in sorted(num_elements)
    )
