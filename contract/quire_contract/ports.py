"""Ports that the processes listen on unless told otherwise."""

from typing import Final

SERVER_HTTP: Final = 8000
SERVER_GRPC: Final = 50051
SERVER_RENDEZVOUS: Final = 29500
"""Where the leader of a replica that spans several pods waits for the others."""
GATEWAY_HTTP: Final = 8080
GATEWAY_ADMIN: Final = 8081
OPERATOR_HEALTH: Final = 8080
OPERATOR_METRICS: Final = 9090
SERVICE_HTTP: Final = 80
DOWNLOAD_PROGRESS: Final = 8000
