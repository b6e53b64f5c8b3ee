"""Where a tensor of a plan lies in a checkpoint, under its own name or an alias. Imports no torch."""

from quire_server.errors import CheckpointError
from quire_server.weights.checkpoint import Checkpoint
from quire_server.weights.stored import StoredTensor


def find_stored(checkpoint: Checkpoint, aliases: tuple[tuple[str, str], ...], name: str) -> StoredTensor:
    """Return where a tensor lies. Raises CheckpointError."""
    names = checkpoint.tensor_names
    if name not in names:
        for prefix, other in aliases:
            alias = other + name.removeprefix(prefix)
            if name.startswith(prefix) and alias in names:
                return checkpoint.stored(alias)
    return checkpoint.stored(name)


def look_up_stored(checkpoint: Checkpoint, aliases: tuple[tuple[str, str], ...], name: str) -> StoredTensor | None:
    """Return where a tensor lies; None: nowhere."""
    try:
        return find_stored(checkpoint, aliases, name)
    except CheckpointError:
        return None
