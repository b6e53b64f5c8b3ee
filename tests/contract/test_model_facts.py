"""The facts of a model on the wire: small enough, and read whatever version wrote them."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from quire_contract.memory.kv_cache import KVCacheGroup
from quire_contract.memory.model_shape import LayerShares, ModelShape, WeightShare
from quire_contract.model_facts import MAX_FACTS_BYTES, ModelFacts, decode_facts, encode_facts
from quire_server.models.footprint import shape_of_config

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
OLDER = (
    '{"type":"ModelFacts","path":"m-1","bytes":5,"revision":"abc","isStoredFormKept":true,"shape":{"family":"llama",'
    '"num_layers":2,"hidden_size":64,"vocab_size":100,"max_position_embeddings":256,"qkv_width":128,"mlp_width":384,'
    '"parameters":[{"name":"attention","count":24576,"is_per_layer":true,"is_split":true}],"kv_layers":[{"num_layers":2,'
    '"num_kv_heads":2,"key_dim":16,"value_dim":16,"sliding_window":null}],"checkpoint_dtype":"bfloat16",'
    '"stored_weights_bytes":null}}'
)
"""As versions before layers had kinds wrote it."""


def facts(shape: ModelShape | None, path: str = "model-0123456789") -> ModelFacts:
    return ModelFacts(path=path, bytes=10**12, revision="0" * 40, shape=shape)


def deepseek_v3() -> ModelShape:
    """61 layers: 3 dense, 58 with experts; one latent. Every number as long as it gets."""
    share = WeightShare(num_elements=10**10, num_bytes=10**10, num_pieces=10**5, can_replicate=False)
    return replace(
        shape_of_config(LLAMA_405B),
        layer_weights=(
            LayerShares(layers=tuple(range(3)), shares=(share,) * 5),
            LayerShares(layers=tuple(range(3, 61)), shares=(share,) * 6),
        ),
        kv_groups=(KVCacheGroup(kind="latent", layers=tuple(range(61)), num_kv_heads=1, key_dim=576, value_dim=0),),
    )


@pytest.mark.parametrize("shape", [shape_of_config(LLAMA_405B), deepseek_v3()], ids=["126 layers", "two kinds"])
def test_large_models_fit_into_a_termination_message(shape: ModelShape) -> None:
    encoded = encode_facts(facts(shape, path="m" * 250))
    assert len(encoded) < MAX_FACTS_BYTES // 2
    assert decode_facts(encoded) == facts(shape, path="m" * 250)


def test_a_model_whose_every_layer_differs_in_windows_and_weights_in_turn() -> None:
    """Alternating kinds, as Gemma 2's windows and Qwen-MoE's sparse step are, take no more than runs do."""
    base = shape_of_config(LLAMA_405B)
    (kind,), (group,) = base.layer_weights, base.kv_groups
    even, odd = tuple(range(0, 126, 2)), tuple(range(1, 126, 2))
    shape = replace(
        base,
        layer_weights=(LayerShares(layers=even, shares=kind.shares), LayerShares(layers=odd, shares=kind.shares[:1])),
        kv_groups=(replace(group, layers=even, kind="window", window=4096), replace(group, layers=odd)),
    )
    assert len(encode_facts(facts(shape))) < MAX_FACTS_BYTES // 2


def test_facts_of_an_older_version_tell_what_they_can() -> None:
    older = decode_facts(OLDER)
    assert older is not None
    assert (older.path, older.bytes, older.revision, older.shape) == ("m-1", 5, "abc", None)
    assert "another version" in older.shape_error
    assert older.is_outdated


def test_facts_that_are_written_again_are_not_outdated() -> None:
    """Whoever writes what a download Job has just found must not find cause for another one in it."""
    older = decode_facts(OLDER)
    assert older is not None
    assert b"isOutdated" not in encode_facts(older)
    assert decode_facts(encode_facts(older)) == msgspec.structs.replace(older, is_outdated=False)


def test_facts_of_a_newer_version_may_say_more() -> None:
    wire = json.loads(encode_facts(facts(shape_of_config(LLAMA_405B))))
    wire["shape"]["num_experts"] = wire["unheardOf"] = 5
    wire["shape"]["layer_weights"][0].append("more")
    assert decode_facts(json.dumps(wire)) == facts(shape_of_config(LLAMA_405B))


@pytest.mark.parametrize(
    "change",
    [
        {"kv_groups": [{"kind": "recurrent", "layers": [0]}]},
        {"kv_groups": []},
        {"layer_weights": [[[0], []], [[0], []]]},
        {"layer_weights": []},
        {"first_weights": [[1, 1, 0]]},
        {"vocab_size": 0},
        {"hidden_size": "many"},
    ],
)
def test_a_shape_that_is_not_understood_is_left_out(change: dict[str, Any]) -> None:
    wire = json.loads(encode_facts(facts(shape_of_config(LLAMA_405B))))
    wire["shape"] |= change
    read = decode_facts(json.dumps(wire))
    assert read is not None
    assert (read.shape, read.bytes) == (None, 10**12)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", '"text"', b"\xff", '{"type":"Other"}', '{"type":"ModelFacts","shape":{}}', '{"shape":1}'],
)
def test_what_is_no_facts_is_none(text: str | bytes) -> None:
    assert decode_facts(text) is None


def test_a_share_is_short_on_the_wire() -> None:
    assert msgspec.json.encode(WeightShare(num_elements=12, num_bytes=3, num_pieces=4)) == b"[12,3,4,true]"
