"""`pytest tests/operator --update-golden` rewrites the golden files; read the difference before it is committed.

Makes this folder's helper modules (`fake_kube` and the like) importable by its tests.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/operator/golden")


@pytest.fixture
def is_updating_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden", default=False))
