"""Stored tensors to torch tensors: the one place where the bytes of a checkpoint become numbers."""

import torch
from torch import Tensor

from quire_server.weights.gguf_blocks import dequantize, is_quantized
from quire_server.weights.gguf_reader import BLOCK_TYPES
from quire_server.weights.stored import RowOrder, StoredTensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_BLOCK_BYTES = {block.name: block.num_bytes for block in BLOCK_TYPES.values()}


def read_tensor(stored: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a stored tensor in Hugging Face's order, in `dtype` (None: as it is stored; float32 for quantised blocks).

    A tensor that needs no change is a view of the mapped file: the caller must not write to it.
    """
    raw = read_bytes(stored)
    if is_quantized(stored.encoding):
        blocks = raw.view(-1, _BLOCK_BYTES[stored.encoding])
        values = dequantize(blocks, stored.encoding, torch.float32 if dtype is None else dtype)
    else:
        values = raw.view(_DTYPES[stored.encoding])
    if stored.value_offset:
        values = values.float().add_(stored.value_offset)
    values = values.view(stored.shape)
    return values if dtype is None else values.to(dtype)


def read_bytes(stored: StoredTensor) -> Tensor:  # [num_bytes] uint8
    """Return a stored tensor still encoded, its rows in Hugging Face's order; a view where they are so on disk."""
    raw = torch.frombuffer(stored.mapping, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)
    if stored.row_order is None:
        return raw
    return _restore_rows(raw.view(stored.shape[0], -1), stored.row_order).view(-1)


def _restore_rows(rows: Tensor, order: RowOrder) -> Tensor:
    """Put rows[num_rows, row_bytes] into Hugging Face's order, still encoded: a row is a whole number of blocks."""
    num_rows, row_bytes = rows.shape
    if order.kind == "interleaved_rope":
        grouped = rows.view(order.num_heads, num_rows // order.num_heads // 2, 2, row_bytes).transpose(1, 2)
    else:
        grouped = rows.view(3, order.num_heads, num_rows // order.num_heads // 3, row_bytes).transpose(0, 1)
    return grouped.reshape(num_rows, row_bytes)
