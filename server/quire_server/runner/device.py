"""Which device a worker runs on.

It is also where the worker's process works (`use_device`).
"""

import torch

from quire_server.shared.config import EngineConfig
from quire_server.shared.errors import ConfigError


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """Return the device of a worker: the GPU with the number of its rank, or the CPU.

    Raises:
        ConfigError: a GPU was asked for, and there is none for this rank.
    """
    # The driver may count GPUs that it cannot initialise.
    num_gpus = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0
    if config.device == "cuda" and num_gpus == 0:
        raise ConfigError("--device cuda was asked for, and torch sees no CUDA device.", stage="Starting")
    if num_gpus == 0:
        return torch.device("cpu")
    if rank >= num_gpus:
        raise ConfigError(
            f"The engine needs {config.parallel.world_size} GPUs, and torch sees {num_gpus}.",
            stage="Starting",
            hint="Lower --tensor-parallel-size or --pipeline-parallel-size, or give the server more GPUs.",
        )
    return torch.device("cuda", rank)


def use_device(device: torch.device) -> None:
    """Let what names no device of its own (kernels, streams, graphs) go to this one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
