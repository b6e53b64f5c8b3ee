"""Small GGUF files of one tensor, written byte by byte."""

import struct
from pathlib import Path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write_gguf(path: Path, metadata: dict[str, int | float | str], shape: tuple[int, int] = (100, 64)) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata))
    for key, value in metadata.items():
        header += text(key)
        if isinstance(value, str):
            header += struct.pack("<I", 8) + text(value)
        else:
            header += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
    header += text("token_embd.weight") + struct.pack("<IQQIQ", 2, shape[1], shape[0], 0, 0)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(shape[0] * shape[1] * 4))


LLAMA = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
    "llama.feed_forward_length": 128, "llama.context_length": 512, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def gguf_bytes(num_bytes: int = 200_000) -> bytes:
    """Return a GGUF file of one tensor, of an architecture that is not known."""
    num_elements = num_bytes // 4
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("general.architecture") + struct.pack("<I", 8) + text("none")
    header += text("t") + struct.pack("<IQIQ", 1, num_elements, 0, 0)
    header += bytes(-len(header) % 32)
    return header + bytes(i % 251 for i in range(num_elements * 4))
