"""The command line that pods and `quire up` give the server."""

from typing import Any

import pytest

from quire_operator.plan.server_arguments import server_arguments
from quire_operator.spec.llm_deployment import LLMDeployment


def arguments(engine: dict[str, Any]) -> list[str]:
    spec = {"model": {"uri": "hf://a/b", "servedNames": ["x", "y"]}, "profile": "p", "engine": engine}
    deployment = LLMDeployment.from_manifest({"metadata": {"name": "m"}, "spec": spec})
    return server_arguments(deployment, model="/models/m", host="0.0.0.0", port=8000)


def test_defaults_are_left_to_the_server() -> None:
    assert arguments({}) == [
        *("/models/m", "--host=0.0.0.0", "--port=8000", "--served-model-name=x", "--served-model-name=y"),
        *("--max-num-seqs=64", "--shutdown-timeout=120"),
    ]


@pytest.mark.parametrize(
    ("engine", "flag"),
    [
        ({"maxModelLen": 4096}, "--max-model-len=4096"),
        ({"dtype": "float32"}, "--dtype=float32"),
        ({"kvCacheDtype": "fp8"}, "--kv-cache-dtype=fp8"),
        ({"tensorParallelSize": 4}, "--tensor-parallel-size=4"),
        (
            {"speculative": {"method": "ngram", "numSpeculativeTokens": 3}},
            '--speculative-config={"method": "ngram", "num_speculative_tokens": 3}',
        ),
    ],
)
def test_what_the_manifest_sets_is_passed_on(engine: dict[str, Any], flag: str) -> None:
    assert flag in arguments(engine)
