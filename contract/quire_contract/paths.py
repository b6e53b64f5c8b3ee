"""HTTP paths that another process calls by name, and the layout of the model cache on disk."""

from typing import Final

LIVEZ: Final = "/livez"
READYZ: Final = "/readyz"
HEALTH: Final = "/health"
METRICS: Final = "/metrics"
MODELS: Final = "/v1/models"
DEMAND: Final = "/v1/demand"

TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_LOG_ENV: Final = "QUIRE_TERMINATION_LOG"
"""Names the file that the end of a process is written to, where it is not Kubernetes' own."""

COMPLETE_MARKER: Final = ".complete"
"""Empty file in a model directory, made last: with it, the directory holds every file of the revision."""
