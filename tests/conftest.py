"""What all tests share: how properties are tried, and a tiny checkpoint for tests of a whole server."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny_model import save_tiny_llama

_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
settings.register_profile("same", _patient, derandomize=True)
settings.register_profile("explore", _patient)  # pytest --hypothesis-profile explore: other examples each time
settings.load_profile("same")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, as `transformers` saves it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))
