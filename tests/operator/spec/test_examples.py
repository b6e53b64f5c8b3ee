"""Every example can be applied, and is read as it was meant."""

from pathlib import Path

import pytest

from quire_contract.model_uri import parse_model_uri
from quire_contract.units import parse_quantity
from quire_operator.spec.llm_deployment import LLMDeployment
from quire_operator.spec.validation import load_documents, validate_manifest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid(file: Path) -> None:
    documents = load_documents(file)
    assert documents
    for document in documents:
        assert validate_manifest(document) == ()
        LLMDeployment.from_manifest(document)


def _read(name: str) -> LLMDeployment:
    (document,) = load_documents(EXAMPLES / name)
    return LLMDeployment.from_manifest(document)


def test_the_demo_is_a_file_of_the_repository_served_as_smollm2() -> None:
    deployment = _read("smollm2.yaml")
    assert deployment.spec.model.served_names == ("smollm2",)
    path = parse_model_uri(deployment.spec.model.uri).local_path(EXAMPLES)
    assert path == EXAMPLES.parent / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_four_gpus_are_asked_for_where_four_are_used() -> None:
    spec = _read("llama-70b-tp4.yaml").spec
    assert spec.resources is not None
    assert parse_quantity(spec.resources.limits["nvidia.com/gpu"]) == spec.engine.tensor_parallel_size == 4


def test_scale_to_zero_goes_to_zero() -> None:
    scaling = _read("scale-to-zero.yaml").spec.scaling
    assert (scaling.min, scaling.idle_to_zero_after_s) == (0, 600.0)
