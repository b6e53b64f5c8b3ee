"""Does a model fit one replica's memory, and what fits besides? The server's own arithmetic, before a server runs.

Pure integers: the operator asks before a GPU is taken, and gets the answer that the server would give (a test compares
the two). Where a replica has several devices, all numbers are of the one that holds most.
"""

from dataclasses import dataclass
from typing import Final

from quire_contract.model_shape import FitError, KVLayers, ModelShape, shape_from_gguf, shape_from_hf_config

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "DEFAULT_GPU_MEMORY_UTILIZATION",
    "DEFAULT_MAX_NUM_BATCHED_TOKENS",
    "NUM_NULL_BLOCKS",
    "FitError",
    "FitReport",
    "FitRequest",
    "ModelShape",
    "check_fit",
    "dtype_bytes",
    "kv_bytes_per_token",
    "shape_from_gguf",
    "shape_from_hf_config",
    "weights_bytes",
    "workspace_bytes",
]

DEFAULT_BLOCK_SIZE: Final = 16
DEFAULT_GPU_MEMORY_UTILIZATION: Final = 0.9
DEFAULT_MAX_NUM_BATCHED_TOKENS: Final = 2048
"""What the server does without the flags of these names."""
NUM_NULL_BLOCKS: Final = 1
"""Blocks of the KV cache that no sequence gets: unused table entries point at block 0."""
LOGITS_CHUNK_BYTES: Final = 64 << 20
"""Where many rows of logits are needed (log-probabilities of prompts), they are made in chunks of so many bytes."""
_NUM_LOGITS_COPIES: Final = 3
"""The logits, their processed copy, and a sort or a softmax of it."""
_LOGIT_BYTES: Final = 4

_DTYPE_BYTES: Final = {
    **dict.fromkeys(("float32", "float"), 4),
    **dict.fromkeys(("bfloat16", "float16", "half"), 2),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 1),
}


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one element.

    Raises:
        FitError: the type is not known.
    """
    if dtype not in _DTYPE_BYTES:
        raise FitError(f"dtype {dtype!r} is not known; known are {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """A model, the server's settings, and the memory of one device (on a CPU: the pod's limit)."""

    shape: ModelShape
    memory_bytes: int
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    dtype: str = "auto"
    """auto: the checkpoint's own; bfloat16 where it has none that can be computed in."""
    kv_cache_dtype: str = "auto"
    """auto: that of the activations."""
    max_model_len: int | None = None
    """None: the model's own limit."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = DEFAULT_BLOCK_SIZE
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    is_stored_form_kept: bool = False
    """The weights stay in memory as they are on disk (quantised GGUF), not unpacked to `dtype`."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _require_positive(name, getattr(self, name))
        _require_positive("tensor_parallel_size", self.tensor_parallel_size)
        _require_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        if self.max_model_len is not None:
            _require_positive("max_model_len", self.max_model_len)
            if self.max_model_len > self.shape.max_position_embeddings:
                positions = self.shape.max_position_embeddings
                raise FitError(f"max_model_len {self.max_model_len} is more than the model's {positions} positions")
        if self.is_stored_form_kept and self.shape.stored_weights_bytes is None:
            raise FitError("is_stored_form_kept needs the sizes of the stored tensors")

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of weights and activations."""
        if self.dtype != "auto":
            return dtype_bytes(self.dtype)
        return dtype_bytes("float32" if self.shape.checkpoint_dtype == "float32" else "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """`status.fit` of an LLMDeployment. Bytes are of one device."""

    fits: bool
    """One sequence of the wanted length runs."""
    need_bytes: int
    """Weights, workspace, and the KV cache of one sequence of the wanted length."""
    have_bytes: int
    weights_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    max_concurrent_sequences: int
    """Sequences of the wanted length that run at once."""
    max_model_len: int
    """The longest sequence that would fit; 0: the model does not."""


def check_fit(request: FitRequest) -> FitReport:
    """Tell whether the model fits, and what room is left for the KV cache."""
    shape, block_size = request.shape, request.block_size
    wanted_len = request.max_model_len or shape.max_position_embeddings
    weights, workspace = weights_bytes(request), workspace_bytes(request)
    per_token = kv_bytes_per_token(request)
    have = int(request.memory_bytes * request.gpu_memory_utilization)
    num_blocks = max(0, (have - weights - workspace) // (per_token * block_size) - NUM_NULL_BLOCKS)
    capacity = num_blocks * block_size
    need = weights + workspace + (_ceil_div(wanted_len, block_size) + NUM_NULL_BLOCKS) * block_size * per_token
    fits = need <= have
    num_concurrent = num_blocks // _held_blocks(request, wanted_len)
    return FitReport(
        fits=fits,
        need_bytes=need,
        have_bytes=have,
        weights_bytes=weights,
        workspace_bytes=workspace,
        kv_bytes_per_token=per_token,
        kv_capacity_tokens=capacity,
        max_concurrent_sequences=min(request.max_num_seqs, num_concurrent) if fits else 0,
        max_model_len=min(capacity, shape.max_position_embeddings),
    )


def weights_bytes(request: FitRequest) -> int:
    """Return the bytes of weights on the device that holds most."""
    shape, num_stages = request.shape, request.pipeline_parallel_size
    counts = {group.name: _ceil_div(group.count, request.tensor_parallel_size) for group in shape.parameters}
    counts.update({group.name: group.count for group in shape.parameters if not group.is_split})
    layers = sum(counts[group.name] for group in shape.parameters if group.is_per_layer)
    ends = [counts[group.name] for group in shape.parameters if not group.is_per_layer]
    largest_stage = _ceil_div(layers * _ceil_div(shape.num_layers, num_stages), shape.num_layers)
    # With stages, the embedding is on the first and the head on the last; tied, each holds a copy.
    num_elements = largest_stage + (sum(ends) if num_stages == 1 else max(ends))
    if request.is_stored_form_kept:
        assert shape.stored_weights_bytes is not None  # checked where the request was built
        return _ceil_div(shape.stored_weights_bytes * num_elements, shape.num_parameters)
    return num_elements * request.activation_bytes


def kv_bytes_per_token(request: FitRequest) -> int:
    """Return the bytes of keys and values of one token in all layers of the fullest device, as blocks hold them.

    A block holds every layer, whatever its window; that windows free blocks counts in `max_concurrent_sequences`.
    """
    is_auto = request.kv_cache_dtype == "auto"
    item_bytes = request.activation_bytes if is_auto else dtype_bytes(request.kv_cache_dtype)
    total = sum(layers.num_layers * _elements_per_token(layers, request) for layers in request.shape.kv_layers)
    num_layers = request.shape.num_layers
    return _ceil_div(total * _ceil_div(num_layers, request.pipeline_parallel_size), num_layers) * item_bytes


def workspace_bytes(request: FitRequest) -> int:
    """Return the most bytes that a step holds besides weights and KV: the widest moment of a layer, and the logits."""
    shape, split = request.shape, request.tensor_parallel_size
    width = 4 * shape.hidden_size + max(_ceil_div(2 * shape.qkv_width, split), _ceil_div(shape.mlp_width, split))
    activations = request.max_num_batched_tokens * width * request.activation_bytes
    chunk_rows = max(LOGITS_CHUNK_BYTES // (_LOGIT_BYTES * shape.vocab_size), 1)
    rows = max(request.max_num_seqs, min(request.max_num_batched_tokens, chunk_rows))
    return activations + rows * shape.vocab_size * _LOGIT_BYTES * _NUM_LOGITS_COPIES


def _elements_per_token(layers: KVLayers, request: FitRequest) -> int:
    """Elements of one token in one layer. Fewer heads than devices: each device holds a copy of one."""
    heads = _ceil_div(layers.num_kv_heads, request.tensor_parallel_size)
    return heads * (layers.key_dim + layers.value_dim)


def _held_blocks(request: FitRequest, seq_len: int) -> int:
    """Blocks that a sequence holds at most; those behind a window that all layers share are given back."""
    window = request.shape.uniform_sliding_window
    num_blocks = _ceil_div(seq_len, request.block_size)
    if window is None:
        return num_blocks
    num_visible_tokens = window - 1 + request.max_num_batched_tokens
    return min(num_blocks, _ceil_div(num_visible_tokens, request.block_size) + 1)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise FitError(f"{name} must be at least 1, not {value}")
