"""Does a model fit the memory of its devices, and what fits besides? The one arithmetic of memory.

Pure integers. The operator asks before a GPU is taken (`check_fit`), and the server when it starts (`device_memory`);
both get their numbers here. Where a replica has several devices, all numbers are of the one that holds most.
"""

from dataclasses import dataclass
from typing import Final

from quire_contract.memory.dtypes import FitError, dtype_bytes
from quire_contract.memory.kv_cache import KVCacheSpec, KVFormat
from quire_contract.memory.model_shape import ModelShape, sum_on_device

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "DEFAULT_GPU_MEMORY_UTILIZATION",
    "DEFAULT_MAX_NUM_BATCHED_TOKENS",
    "NUM_NULL_BLOCKS",
    "DeviceMemory",
    "FitError",
    "FitReport",
    "FitRequest",
    "ModelShape",
    "check_fit",
    "device_memory",
    "logits_chunk_rows",
    "stage_layers",
    "usable_bytes",
]

DEFAULT_BLOCK_SIZE: Final = 16
DEFAULT_GPU_MEMORY_UTILIZATION: Final = 0.9
DEFAULT_MAX_NUM_BATCHED_TOKENS: Final = 2048
"""What the server does without the flags of these names."""
NUM_NULL_BLOCKS: Final = 1
"""Blocks of the KV cache that no sequence gets: unused table entries point at block 0."""
_LOGITS_CHUNK_BYTES: Final = 64 << 20
"""Where many rows of logits are needed (log-probabilities of prompts), they are made in chunks of so many bytes."""
_NUM_LOGITS_COPIES: Final = 3
"""The logits, their processed copy, and a sort or a softmax of it."""
_LOGIT_BYTES: Final = 4


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

    def __post_init__(self) -> None:
        sizes = ("max_num_seqs", "max_num_batched_tokens", "block_size")
        for name in (*sizes, "tensor_parallel_size", "pipeline_parallel_size"):
            _require_positive(name, getattr(self, name))
        if self.max_model_len is not None:
            _require_positive("max_model_len", self.max_model_len)
            if self.max_model_len > self.shape.max_position_embeddings:
                positions = self.shape.max_position_embeddings
                raise FitError(f"max_model_len {self.max_model_len} is more than the model's {positions} positions")
        if self.pipeline_parallel_size > self.shape.num_layers:
            num_stages, num_layers = self.pipeline_parallel_size, self.shape.num_layers
            raise FitError(f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers")

    @property
    def activation_dtype(self) -> str:
        """Of weights and activations."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.shape.checkpoint_dtype == "float32" else "bfloat16"

    @property
    def kv_cache(self) -> KVCacheSpec:
        """The cache of the whole model."""
        dtype = self.activation_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        return KVCacheSpec(groups=self.shape.kv_groups, format=KVFormat(dtype=dtype))

    @property
    def wanted_len(self) -> int:
        return self.max_model_len or self.shape.max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What one device holds: fixed bytes, and how its KV cache grows by blocks."""

    weights_bytes: int
    workspace_bytes: int
    kv_cache: KVCacheSpec
    block_size: int

    @property
    def bytes_per_block(self) -> int:
        """Of all layers that the device has."""
        return self.kv_cache.bytes_per_block(self.block_size)

    @property
    def fixed_bytes(self) -> int:
        return self.weights_bytes + self.workspace_bytes

    def num_blocks(self, have_bytes: int) -> int:
        """Return the blocks that fit beside all else, null block included."""
        return max(0, (have_bytes - self.fixed_bytes) // self.bytes_per_block)

    def need_bytes(self, num_tokens: int) -> int:
        """Return what it takes that one sequence of so many tokens runs."""
        return self.fixed_bytes + self.kv_bytes(num_tokens)

    def kv_bytes(self, num_tokens: int) -> int:
        """Return the bytes of the blocks of one sequence, null block included."""
        return (_ceil_div(num_tokens, self.block_size) + NUM_NULL_BLOCKS) * self.bytes_per_block


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
    """Tell whether the model fits, and what room is left for the KV cache.

    Raises:
        FitError: its weights cannot be divided among so many devices, or a dtype is not known.
    """
    request.shape.check_divides(request.tensor_parallel_size)
    wanted_len, block_size = request.wanted_len, request.block_size
    devices = [device_memory(request, stage) for stage in range(request.pipeline_parallel_size)]
    fullest = max(devices, key=lambda device: device.need_bytes(wanted_len))
    have = usable_bytes(request.memory_bytes, request.gpu_memory_utilization)
    # All stages have the same blocks, so that there are as many as the stage with the least room can hold.
    num_blocks = max(0, min(device.num_blocks(have) for device in devices) - NUM_NULL_BLOCKS)
    fits = fullest.need_bytes(wanted_len) <= have
    num_held_blocks = request.kv_cache.max_held_blocks(
        wanted_len, block_size=block_size, max_num_batched_tokens=request.max_num_batched_tokens
    )
    return FitReport(
        fits=fits,
        need_bytes=fullest.need_bytes(wanted_len),
        have_bytes=have,
        weights_bytes=fullest.weights_bytes,
        workspace_bytes=fullest.workspace_bytes,
        kv_bytes_per_token=_ceil_div(fullest.bytes_per_block, block_size),
        kv_capacity_tokens=num_blocks * block_size,
        max_concurrent_sequences=min(request.max_num_seqs, num_blocks // num_held_blocks) if fits else 0,
        max_model_len=min(num_blocks * block_size, request.shape.max_position_embeddings),
    )


def device_memory(request: FitRequest, stage: int = 0) -> DeviceMemory:
    """Return what a device of a pipeline stage holds; of a tensor-parallel group, the one that holds most.

    Raises:
        FitError: a dtype is not known.
    """
    layers = stage_layers(request.shape.num_layers, request.pipeline_parallel_size)[stage]
    return DeviceMemory(
        weights_bytes=_weights_bytes(request, stage, layers),
        workspace_bytes=_workspace_bytes(request),
        kv_cache=request.kv_cache.share(tensor_parallel_size=request.tensor_parallel_size, layers=layers),
        block_size=request.block_size,
    )


def stage_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Return the layers of each pipeline stage, as equal as can be."""
    ends = [_ceil_div(num_layers * (stage + 1), num_stages) for stage in range(num_stages)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def usable_bytes(memory_bytes: int, gpu_memory_utilization: float) -> int:
    """Return what of a memory the server takes."""
    return int(memory_bytes * gpu_memory_utilization)


def logits_chunk_rows(vocab_size: int) -> int:
    """Return the rows of logits that are made at a time where many are needed (log-probabilities of prompts)."""
    return max(_LOGITS_CHUNK_BYTES // (_LOGIT_BYTES * vocab_size), 1)


def _weights_bytes(request: FitRequest, stage: int, layers: range) -> int:
    shape, item_bytes, split = request.shape, dtype_bytes(request.activation_dtype), request.tensor_parallel_size
    total = 0
    for kind in shape.layer_weights:
        num_layers = sum(layer in layers for layer in kind.layers)
        total += num_layers * sum_on_device(kind.shares, item_bytes, split)
    if stage == 0:
        total += sum_on_device(shape.first_weights, item_bytes, split)
    if stage == request.pipeline_parallel_size - 1:
        total += sum_on_device(shape.last_weights, item_bytes, split)
        if stage != 0:
            total += sum_on_device(shape.tied_weights, item_bytes, split)
    return total


def _workspace_bytes(request: FitRequest) -> int:
    """Return the most bytes that a step holds besides weights and KV: the widest moment of a layer, and the logits."""
    shape, split = request.shape, request.tensor_parallel_size
    width = 4 * shape.hidden_size + _ceil_div(shape.activation_width, split)
    activations = request.max_num_batched_tokens * width * dtype_bytes(request.activation_dtype)
    rows = max(request.max_num_seqs, min(request.max_num_batched_tokens, logits_chunk_rows(shape.vocab_size)))
    return activations + rows * shape.vocab_size * _LOGIT_BYTES * _NUM_LOGITS_COPIES


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise FitError(f"{name} must be at least 1, not {value}")
