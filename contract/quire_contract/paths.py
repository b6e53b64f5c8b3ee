"""HTTP paths that another process calls by name, and the layout of the model cache on disk."""

from typing import Final

LIVEZ: Final = "/livez"
READYZ: Final = "/readyz"
HEALTH: Final = "/health"
METRICS: Final = "/metrics"
MODELS: Final = "/v1/models"
DEMAND: Final = "/v1/demand"
PROGRESS: Final = "/progress"
"""Where a running download says how far it is: a `DownloadProgress`."""

TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_LOG_ENV: Final = "QUIRE_TERMINATION_LOG"
"""Names the file that the end of a process is written to, where it is not Kubernetes' own."""

COMPLETE_MARKER: Final = ".complete"
"""File in a model directory, made last: with it, the directory holds every file of the revision. It holds the
`ModelFacts` as JSON, or nothing where the files were fetched without a cluster."""

MODELS_MOUNT: Final = "/models"
"""Where pods mount the cache volume; a model is in the directory below it that `ModelUri.cache_key` names."""
