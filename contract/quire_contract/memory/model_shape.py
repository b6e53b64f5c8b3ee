"""What a model's memory depends on, as numbers: what crosses from the download Job to the operator.

The server's families, specs and plans make them (`models/footprint.py`); here is no family and no name of a
tensor. Sizes are of the whole model. What depends on flags (dtype, devices) is left open: elements are counted apart
from bytes, and what devices divide apart from what each of them holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from quire_contract.memory.dtypes import FitError
from quire_contract.memory.kv_cache import KVCacheGroup

__all__ = ["FitError", "LayerShares", "ModelShape", "WeightShare"]


class WeightShare(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Weights that devices divide alike. An array on the wire: a model may have many of them."""

    num_elements: int = 0
    """Those held in the dtype of the activations."""
    num_bytes: int = 0
    """Of the others, whatever that dtype is: norms (float32), quantised tensors."""
    num_pieces: int = 1
    """Equal pieces that tensor parallelism deals out (heads, rows); 1: every device holds all."""
    can_replicate: bool = True
    """Whether devices may hold copies of a piece, where they are more than the pieces (KV heads; what is whole)."""

    def __post_init__(self) -> None:
        if self.num_pieces < 1:
            raise FitError(f"num_pieces must be at least 1, not {self.num_pieces}")

    def bytes_on_device(self, element_bytes: int, tensor_parallel_size: int) -> int:
        """Return the bytes on the device that holds most."""
        return bytes_on_device(
            self.num_elements * element_bytes + self.num_bytes, self.num_pieces, tensor_parallel_size
        )


class LayerShares(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Layers with the same weights."""

    layers: tuple[int, ...]
    """Their numbers, ascending."""
    shares: tuple[WeightShare, ...]
    """Of one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model."""

    architecture: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    """Tokens that it reads, stretched by its rotary scaling."""
    activation_width: int
    """Elements of one token in the widest half of a layer, of which devices hold a share each: query, key and value
    twice, or all outputs of the feed-forward's first projection and what is made of them."""
    num_parameters: int
    """As they are stored; tied ones once."""
    layer_weights: tuple[LayerShares, ...]
    first_weights: tuple[WeightShare, ...]
    """Before the layers: embeddings."""
    last_weights: tuple[WeightShare, ...]
    """Behind the layers: final norm, output matrix."""
    tied_weights: tuple[WeightShare, ...] = ()
    """Of `first_weights`: used again behind the layers, and held twice where the two ends are on different devices."""
    kv_groups: tuple[KVCacheGroup, ...]
    checkpoint_dtype: str | None = None

    def __post_init__(self) -> None:
        layers = sorted(layer for kind in self.layer_weights for layer in kind.layers)
        kept = sorted(layer for group in self.kv_groups for layer in group.layers)
        if layers != list(range(len(layers))) or not kept or not set(kept) <= set(layers):
            raise FitError("every layer must have its weights once, and only layers a KV cache")
        for name in ("hidden_size", "vocab_size", "max_position_embeddings", "activation_width"):
            if getattr(self, name) < 1:
                raise FitError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def num_layers(self) -> int:
        return sum(len(kind.layers) for kind in self.layer_weights)

    def check_divides(self, tensor_parallel_size: int) -> None:
        """Raises FitError: some of the weights cannot be shared by so many devices."""
        layers = [share for kind in self.layer_weights for share in kind.shares]
        for share in (*self.first_weights, *layers, *self.last_weights):
            if not can_divide(share.num_pieces, share.can_replicate, tensor_parallel_size):
                pieces = f"{share.num_pieces} equal pieces (heads, or rows)"
                raise FitError(f"the model has weights of {pieces}, which {tensor_parallel_size} devices cannot share")


def can_divide(num_pieces: int, can_replicate: bool, tensor_parallel_size: int) -> bool:
    """Say whether devices can share equal pieces: each gets as many, or as many devices get a copy of each."""
    if num_pieces % tensor_parallel_size == 0:
        return True
    return can_replicate and tensor_parallel_size % num_pieces == 0


def bytes_on_device(num_bytes: int, num_pieces: int, tensor_parallel_size: int) -> int:
    """Return what the device that holds most has of equal pieces; more devices than pieces hold copies of one."""
    num_held_pieces = -(-num_pieces // tensor_parallel_size)
    return -(-num_bytes * num_held_pieces // num_pieces)


def sum_on_device(shares: Iterable[WeightShare], element_bytes: int, tensor_parallel_size: int) -> int:
    """Return the bytes of all on the device that holds most."""
    return sum(share.bytes_on_device(element_bytes, tensor_parallel_size) for share in shares)
