"""From a checkpoint to a model: check everything, then read every tensor once into the form in which it runs.

Invariants: nothing is read before all names and shapes are known to be right and the weights known to fit; beside the
model itself, at most one linear layer per loading thread is in memory.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from math import prod
from typing import Any

import torch

from quire_server.config import Dtype
from quire_server.models import memory
from quire_server.models.builder import ModelBuilder, OuterParts
from quire_server.models.decoder import DecoderModel, DecoderParts
from quire_server.models.layers import DecoderLayer
from quire_server.models.linear import LinearMethod, select_linear_method
from quire_server.models.plan import LinearPlan, NormPlan, TablePlan, build_plan
from quire_server.models.reader import CheckpointReader
from quire_server.models.registry import find_family
from quire_server.models.rope_table import RopeTable
from quire_server.weights.checkpoint import Checkpoint

_MAX_LOADING_THREADS = 8
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_Shapes = dict[str, tuple[int, ...]]


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
) -> DecoderModel:
    """Load a model.

    Args:
        on_progress: told the share of bytes read so far, in (0, 1], from the calling thread.
        max_model_len: the longest sequence to be served, on which some rotary scalings depend; None: the model's own.

    Raises UnsupportedModelError, CheckpointError, OutOfMemoryError: all of them before anything is read.
    """
    family = find_family(checkpoint.config)
    spec, method = family.build_spec(checkpoint.config), select_linear_method(checkpoint.config)
    plan = build_plan(spec, family.weights)
    reader = CheckpointReader(checkpoint, family.weights.aliases, dtype, device)
    outer_shapes = _shapes(plan.outer_parts(), method)
    layer_shapes = [_shapes(layer.parts(), method) for layer in plan.layers]
    stored_bytes = [reader.check(shapes) for shapes in (outer_shapes, *layer_shapes)]
    need_bytes = sum(_loaded_bytes(shapes, dtype) for shapes in (outer_shapes, *layer_shapes))
    memory.check_fits(need_bytes, memory.free_bytes(device), device)
    builder = ModelBuilder(spec, plan, method, reader)
    outer, layers = _build(builder, stored_bytes, on_progress)
    parts = DecoderParts(
        **outer._asdict(),
        layers=layers,
        rope=None if spec.rope is None else RopeTable(spec.rope, max_model_len or spec.max_position_embeddings, device),
        dtype=dtype,
        num_parameter_bytes=builder.num_parameter_bytes,
    )
    return DecoderModel(spec, parts)


def _build(
    builder: ModelBuilder, stored_bytes: list[int], on_progress: Callable[[float], None]
) -> tuple[OuterParts, tuple[DecoderLayer, ...]]:
    """Build everything, several parts at a time; the largest, the embedding, first."""
    num_threads = torch.get_num_threads()
    # One thread per part rather than all threads on one operator: the operators of dequantising are too small to share.
    pool = ThreadPoolExecutor(
        min(num_threads, _MAX_LOADING_THREADS), "load", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        outer = pool.submit(builder.build_outer)
        layers = [pool.submit(builder.build_layer, index) for index in range(len(stored_bytes) - 1)]
        futures: list[Future[Any]] = [outer, *layers]
        _report(dict(zip(futures, stored_bytes, strict=True)), on_progress)
        return outer.result(), tuple(layer.result() for layer in layers)
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


def _shapes(parts: Iterable[TablePlan | NormPlan | LinearPlan], method: LinearMethod) -> _Shapes:
    shapes: _Shapes = {}
    for part in parts:
        if isinstance(part, LinearPlan):
            shapes |= method.tensor_shapes(part)
        elif isinstance(part, TablePlan):
            shapes[f"{part.module}.weight"] = (part.num_rows, part.row_size)
        else:
            shapes[f"{part.module}.weight"] = (part.size,)
            if part.spec.has_bias:
                shapes[f"{part.module}.bias"] = (part.size,)
    return shapes


def _loaded_bytes(shapes: _Shapes, dtype: torch.dtype) -> int:
    """Matrices take the model's dtype, vectors at most float32."""
    return sum(prod(shape) * (4 if len(shape) == 1 else dtype.itemsize) for shape in shapes.values())
