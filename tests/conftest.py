"""A tiny checkpoint that every test of a whole server shares."""

from pathlib import Path

import pytest
from tiny_model import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, as `transformers` saves it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))
