"""The operator's arithmetic is the server's: what one foretells, the other does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire_contract.fit import FitRequest, check_fit, shape_from_hf_config
from quire_server.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.errors import OutOfMemoryError
from quire_server.models.registry import find_family
from quire_server.runner.memory import KVCachePlan, plan_kv_cache

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": 64},
    "Qwen2ForCausalLM": {"model_type": "qwen2"},
    "GemmaForCausalLM": {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
    },
    "OPTForCausalLM": {"model_type": "opt", "ffn_dim": 160, "word_embed_proj_dim": 64, "activation_function": "relu"},
    "GPTNeoXForCausalLM": {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25},
}


@pytest.mark.parametrize(("share_of_need", "fits"), [(0.5, False), (0.99, False), (1.01, True), (8.0, True)])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_both_plan_the_same(architecture: str, share_of_need: float, fits: bool) -> None:
    config = {**COMMON, **CONFIGS[architecture], "architectures": [architecture]}
    request = FitRequest(
        shape=shape_from_hf_config(config),
        memory_bytes=0,
        gpu_memory_utilization=0.8,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    memory_bytes = int(check_fit(request).need_bytes * share_of_need / 0.8)
    report = check_fit(replace(request, memory_bytes=memory_bytes))
    assert report.fits is fits
    settings = EngineConfig(
        model=ModelConfig(model="m", path=Path("m"), served_model_names=("m",), max_model_len=256),
        cache=CacheConfig(block_size=16, gpu_memory_utilization=0.8),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4),
    )

    def plan() -> KVCachePlan:
        return plan_kv_cache(
            find_family(config).build_spec(config),
            settings,
            available_bytes=memory_bytes,
            weights_bytes=report.weights_bytes,
            itemsize=2,
            is_cpu=False,
        )

    if not fits:
        with pytest.raises(OutOfMemoryError):
            plan()
        return
    planned = plan()
    assert report.workspace_bytes == planned.budget.workspace
    assert report.kv_bytes_per_token * 16 == planned.bytes_per_block
    assert report.kv_capacity_tokens == planned.num_tokens
