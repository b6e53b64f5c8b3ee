"""From a checkpoint to a model: check everything, then read every tensor once into the form in which it runs.

Invariants: nothing is read before all names and shapes are known to be right and the weights known to fit; beside the
model itself, at most one linear layer per loading thread is in memory.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch

from quire_contract.flags.table import Dtype
from quire_server.models import free_memory
from quire_server.models.decoder import DecoderModel, DecoderParts
from quire_server.models.modules.builder import Ends, ModelBuilder
from quire_server.models.modules.layers import DecoderLayer
from quire_server.models.modules.rope_table import RopeTables
from quire_server.models.planning.parts import TensorPlan
from quire_server.models.planning.plan import ModelPlan
from quire_server.models.planning.sharding import WHOLE, ModelShare, check_divides, loaded_bytes
from quire_server.models.reader import CheckpointReader
from quire_server.models.registry import plan_model
from quire_server.weights.checkpoint import Checkpoint, lookup_in

_MAX_LOADING_THREADS = 8
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_dtype(requested: Dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations.

    A dtype that is asked for is obeyed. "auto" is the checkpoint's own; but bfloat16 where that is float16 and the
    device a CPU, which has no fast arithmetic for it, and where it is none of the three.
    """
    if requested != "auto":
        return _DTYPES[requested]
    dtype = _DTYPES.get(checkpoint.default_dtype, torch.bfloat16)
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None],
    max_model_len: int | None = None,
    share: ModelShare = WHOLE,
) -> DecoderModel:
    """Load a model, or one worker's share of it.

    Args:
        on_progress: told the share of bytes read so far, in (0, 1], from the calling thread.
        max_model_len: the longest sequence to be served, on which some rotary scalings depend; None: the model's own.

    Raises UnsupportedModelError, CheckpointError, OutOfMemoryError: all of them before anything is read, but for norms
    that no kernel has, or that do not divide.
    """
    plan = plan_model(checkpoint.config, lookup_in(checkpoint))
    reader = CheckpointReader(checkpoint, plan.weights.aliases, dtype, device)
    return load_plan(plan, reader, on_progress=on_progress, max_model_len=max_model_len, share=share)


def load_plan(
    plan: ModelPlan,
    reader: CheckpointReader,
    *,
    on_progress: Callable[[float], None],
    max_model_len: int | None = None,
    share: ModelShare = WHOLE,
) -> DecoderModel:
    """Load what is planned, as `load_model` does."""
    spec, dtype, device = plan.spec, reader.dtype, reader.device
    stage = share.stage(spec.num_layers)
    groups = [list(_end_tensors(plan, share))]
    groups += [[tensor for part in plan.layers[index].parts() for tensor in part.tensors()] for index in stage]
    stored_bytes = [reader.check(group) for group in groups]
    tensors = [tensor for group in groups for tensor in group]
    check_divides(tensors, share)
    need_bytes = sum(loaded_bytes(tensor, dtype.itemsize, share) for tensor in tensors)
    free_memory.check_fits(need_bytes, free_memory.free_bytes(device), device)
    builder = ModelBuilder(plan, reader, share)
    ends, layers = _build(builder, stage, stored_bytes, on_progress)
    parts = DecoderParts(
        **ends._asdict(),
        layers=layers,
        rope=RopeTables(spec.ropes, max_model_len or spec.max_position_embeddings, device),
        dtype=dtype,
        num_parameter_bytes=builder.num_parameter_bytes,
        share=share,
    )
    return DecoderModel(spec, parts)


def _end_tensors(plan: ModelPlan, share: ModelShare) -> Iterator[TensorPlan]:
    """Yield what the ends read that a stage has; a tied embedding once."""
    is_first, is_last = share.is_first(), share.is_last(plan.spec.num_layers)
    if is_first:
        yield from (tensor for part in plan.first_parts() for tensor in part.tensors())
    if is_last:
        yield from (tensor for part in plan.last_parts() for tensor in part.tensors())
        if plan.lm_head is None and not is_first:
            yield from plan.token_embedding.tensors()


def _build(
    builder: ModelBuilder, stage: range, stored_bytes: list[int], on_progress: Callable[[float], None]
) -> tuple[Ends, tuple[DecoderLayer, ...]]:
    """Build everything, several parts at a time; the largest, the embedding, first."""
    num_threads = torch.get_num_threads()
    # One thread per part rather than all threads on one operator: the operators of dequantising are too small to share.
    pool = ThreadPoolExecutor(
        min(num_threads, _MAX_LOADING_THREADS), "load", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        ends = pool.submit(builder.build_ends)
        layers = [pool.submit(builder.build_layer, index) for index in stage]
        futures: list[Future[Any]] = [ends, *layers]
        _report(dict(zip(futures, stored_bytes, strict=True)), on_progress)
        return ends.result(), tuple(layer.result() for layer in layers)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _report(sizes: dict[Future[Any], int], on_progress: Callable[[float], None]) -> None:
    """Wait for all, reporting as they end. Raises the first error."""
    total, done = max(1, sum(sizes.values())), 0
    for future in as_completed(sizes):
        future.result()
        done += sizes[future]
        on_progress(done / total)
