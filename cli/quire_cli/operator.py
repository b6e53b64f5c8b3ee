"""Run the Kubernetes operator: watch LLMDeployments, and make of each what it asks for."""

from quire_operator.__main__ import add_arguments, run

__all__ = ["add_arguments", "run"]
