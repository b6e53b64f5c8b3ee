"""Every example can be applied where it says, and is read as it was meant."""

from pathlib import Path
from typing import Any

import pytest
from plan_world import World

from quire_contract.model_uri import parse_model_uri
from quire_contract.units import parse_quantity
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.validation import load_documents, validate_manifest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
LAPTOP = EXAMPLES / "laptop"
"""What `quire up` runs and a cluster refuses, or does not yet do."""
FILES = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid(file: Path) -> None:
    documents = load_documents(file)
    assert documents
    for document in documents:
        assert validate_manifest(document) == ()
        LLMDeployment.from_manifest(document)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_cluster_accepts_an_example_and_acts_on_all_of_it(file: Path) -> None:
    (document,) = load_documents(file)
    accepted = World(manifest=given(document)).plan().accepted
    assert accepted.holds is True, accepted.message
    assert not {"scaling", "gateway"} & document["spec"].keys(), "nothing acts on these in a cluster yet"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_example_leaves_room_on_its_node(file: Path) -> None:
    """Requests equal to the limits of a whole node's cores find no node: its own pods want some."""
    resources = LLMDeployment.from_manifest(load_documents(file)[0]).spec.resources
    assert resources is not None
    assert parse_quantity(resources.requests["cpu"]) < parse_quantity(resources.limits["cpu"])


def given(document: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as the API server would keep it."""
    metadata = {"namespace": "default", "uid": "u-1", "generation": 1, **document["metadata"]}
    return {**document, "metadata": metadata}


def _read(path: Path) -> LLMDeployment:
    (document,) = load_documents(path)
    return LLMDeployment.from_manifest(document)


def test_the_demo_is_a_file_of_the_repository_served_as_smollm2() -> None:
    deployment = _read(LAPTOP / "smollm2-file.yaml")
    assert deployment.spec.model.served_names == ("smollm2",)
    path = parse_model_uri(deployment.spec.model.uri).local_path(LAPTOP)
    assert path == EXAMPLES.parent / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_scale_to_zero_goes_to_zero() -> None:
    scaling = _read(LAPTOP / "scale-to-zero.yaml").spec.scaling
    assert (scaling.min, scaling.idle_to_zero_after_s) == (0, 600.0)
