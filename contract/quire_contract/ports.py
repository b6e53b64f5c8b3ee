"""Ports that the processes listen on unless told otherwise, and ports as command lines name them."""

import argparse
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


def parse_port(text: str) -> int:
    """Return the port that a command line names; 0 asks for a free one.

    Raises:
        argparse.ArgumentTypeError: it is not a port.
    """
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port: give 1 to 65535, or 0 for a free one")
    return int(text)
