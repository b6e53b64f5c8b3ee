"""A test that takes `native_isa` runs once per instruction set of this CPU; with `isa`, on the torch path too."""

from collections.abc import Iterator

import pytest
import torch

from quire_kernels import build
from quire_kernels._cpu import native


@pytest.fixture(scope="session")
def built_libraries() -> None:
    """Bring the libraries up to date, so that the tests judge the sources that lie here."""
    if native.supported_isas():
        build.build(native.supported_isas())


@pytest.fixture(params=native.supported_isas())
def native_isa(request: pytest.FixtureRequest, built_libraries: None) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(params=[*native.supported_isas(), native.NO_ISA])
def isa(request: pytest.FixtureRequest, built_libraries: None) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
