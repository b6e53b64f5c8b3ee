"""The smallest GGUF file that a download takes."""

import struct


def gguf_bytes(num_bytes: int = 200_000) -> bytes:
    """Return a GGUF file of one tensor, of an architecture that is not known."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    num_elements = num_bytes // 4
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("general.architecture") + struct.pack("<I", 8) + text("none")
    header += text("t") + struct.pack("<IQIQ", 1, num_elements, 0, 0)
    header += bytes(-len(header) % 32)
    return header + bytes(i % 251 for i in range(num_elements * 4))
