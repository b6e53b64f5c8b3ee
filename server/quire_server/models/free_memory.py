"""Whether a model's weights fit. Asked before the first byte is read."""

import torch

from quire_contract.units import format_bytes
from quire_server.shared.errors import OutOfMemoryError
from quire_server.shared.host_limits import available_memory_bytes


def free_bytes(device: torch.device) -> int:
    """Return what this process may still take of the device's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()


def check_fits(need_bytes: int, have_bytes: int, device: torch.device) -> None:
    """Raises OutOfMemoryError with both numbers."""
    if need_bytes > have_bytes:
        raise OutOfMemoryError(
            f"The weights need {format_bytes(need_bytes)}; {format_bytes(have_bytes)} are free on {device}.",
            hint="Give the server more memory, or choose a smaller model or a smaller --dtype.",
            need_bytes=need_bytes,
            have_bytes=have_bytes,
        )
