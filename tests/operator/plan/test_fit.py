"""Whether a model fits, asked with the settings that the server will have."""

from dataclasses import replace
from typing import Any

import pytest
from plan_world import FACTS, GIB, LLAMA, manifest

from quire_contract.memory.fit import FitRequest, check_fit
from quire_contract.model_facts import ModelFacts, decode_facts
from quire_operator.plan.fit import Fit, judge_fit, read_engine_settings, target_pending_per_replica
from quire_operator.plan.hardware import Hardware
from quire_operator.spec.llm_deployment import LLMDeployment, SpecError
from quire_server.models.footprint import shape_of_config


def deployment(engine: dict[str, Any] | None = None, **spec: Any) -> LLMDeployment:
    return LLMDeployment.from_manifest(manifest({"engine": engine or {}, **spec}))


def hardware(memory: str | None = None, *, gpu_bytes: int | None = None, num_gpus: int = 0) -> Hardware:
    limits = {} if memory is None else {"memory": memory}
    return Hardware(limits=limits, requests={}, image="i", num_gpus=num_gpus, gpu_memory_bytes=gpu_bytes)


def judge(engine: dict[str, Any], given: Hardware, facts: ModelFacts | None = FACTS) -> Fit:
    return judge_fit(read_engine_settings(deployment(engine)), given, facts)


def test_need_have_and_the_length_that_would_fit() -> None:
    fit = judge({"maxModelLen": 65536}, hardware("4Gi"))
    assert fit.verdict.holds is False
    assert fit.report is not None
    need, have = fit.report.need_bytes / GIB, fit.report.have_bytes / GIB
    length = int(fit.verdict.message.split()[-3])
    assert fit.verdict.message == (f"needs {need:.1f} GiB, has {have:.1f} GiB; engine.maxModelLen {length} would fit")
    assert judge({"maxModelLen": length}, hardware("4Gi")).verdict.holds is True
    assert judge({"maxModelLen": length + 256}, hardware("4Gi")).verdict.holds is False


def test_a_length_that_nobody_demanded_is_lowered_as_the_server_does() -> None:
    fit = judge({}, hardware("4Gi"))
    assert fit.verdict.holds is True
    assert fit.report is not None
    assert 0 < fit.report.max_model_len < LLAMA["max_position_embeddings"]  # type: ignore[operator]
    assert fit.report.max_concurrent_sequences == 1
    assert judge({"maxModelLen": fit.report.max_model_len}, hardware("4Gi")).report == fit.report


def test_not_even_one_block() -> None:
    fit = judge({}, hardware("2Gi"))
    assert fit.verdict.holds is False
    assert "no context length would fit; raise resources.limits.memory" in fit.verdict.message
    gpu = judge({}, hardware(gpu_bytes=2 * GIB, num_gpus=1))
    assert gpu.verdict.message.endswith("use a GPU with more memory"), "more devices are refused"


@pytest.mark.parametrize(
    ("given", "facts", "reason"),
    [
        (hardware("8Gi"), None, "ModelUnknown"),
        (hardware("8Gi"), ModelFacts(path="b", bytes=1, shape_error="no"), "ArchitectureUnknown"),
        (hardware(), FACTS, "MemoryUnknown"),
        (hardware("8Gi", num_gpus=1), FACTS, "MemoryUnknown"),
    ],
)
def test_what_is_not_known_is_not_judged(given: Hardware, facts: ModelFacts | None, reason: str) -> None:
    fit = judge({}, given, facts)
    assert (fit.verdict.holds, fit.verdict.reason) == (None, reason)
    assert fit.report is None


def test_facts_of_an_older_version_are_outdated_and_leave_it_open_until_they_are_read_anew() -> None:
    """As an operator finds them on a volume after it was upgraded; what it does about it is `test_downloads.py`'s."""
    older = decode_facts(
        '{"type":"ModelFacts","path":"m-1","bytes":5,"shape":{"family":"llama","num_layers":2,"parameters":[]}}'
    )
    assert older is not None
    assert older.is_outdated
    fit = judge({}, hardware("8Gi"), older)
    assert (fit.verdict.holds, fit.verdict.reason) == (None, "FactsOutdated")
    assert "read by another version of Quire." in fit.verdict.message


def test_a_gpus_memory_counts_and_not_the_pods() -> None:
    assert judge({"maxModelLen": 1024}, hardware("1Gi", gpu_bytes=80 * GIB, num_gpus=1)).verdict.holds is True


def test_more_devices_hold_a_share_each() -> None:
    engine = {"maxModelLen": 1024, "tensorParallelSize": 4}
    assert judge({"maxModelLen": 1024}, hardware(gpu_bytes=2 * GIB, num_gpus=4)).verdict.holds is False
    assert judge(engine, hardware(gpu_bytes=2 * GIB, num_gpus=4)).verdict.holds is True
    shared = judge(engine, hardware("8Gi"))
    assert shared.report is not None
    assert shared.report.have_bytes == int(2 * GIB * 0.9)


def test_devices_that_cannot_share_the_model_are_not_said_to_hold_it() -> None:
    """32 heads on 3 GPUs: the server refuses to load it."""
    engine = {"maxModelLen": 1024, "tensorParallelSize": 3}
    fit = judge(engine, hardware(gpu_bytes=80 * GIB, num_gpus=3))
    assert (fit.verdict.holds, fit.verdict.reason) == (None, "FitUnknown")
    assert "3 devices cannot share" in fit.verdict.message


def test_more_positions_than_the_model_has() -> None:
    fit = judge({"maxModelLen": 200_000}, hardware("64Gi"))
    assert (fit.verdict.holds, fit.verdict.reason) == (False, "MaxModelLenTooLong")
    assert "131072 positions" in fit.verdict.message


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--gpu_memory_utilization=0.5"], {"gpu_memory_utilization": 0.5}),
        (["--block-size", "32"], {"block_size": 32}),
        (["--max-num-batched-tokens", "8k"], {"max_num_batched_tokens": 8000}),
        (["--max-model-len", "1K"], {"max_model_len": 1024}),
        (["--max-model-len=auto"], {"max_model_len": None}),
        (["--max-num-seqs", "8", "--max-num-seqs", "16"], {"max_num_seqs": 16}),
        (["--max-num-seqs", "4096"], {"max_num_seqs": 4096, "max_num_batched_tokens": 4096}),
        (["--dtype", "float32"], {"dtype": "float32"}),
        (["--kv-cache-memory-bytes", "1G"], {"kv_cache_memory_bytes": 1 << 30}),
        (["-tp", "1"], {}),
        (["--enable-prefix-caching", "--seed", "1"], {}),
    ],
)
def test_extra_arguments_win_as_in_the_server(arguments: list[str], fields: dict[str, Any]) -> None:
    plain = read_engine_settings(deployment({"maxModelLen": 2048}))
    given = read_engine_settings(deployment({"maxModelLen": 2048, "extraArgs": arguments}))
    assert given == replace(plain, **fields)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--block-size", "24"],
        ["--gpu-memory-utilization", "1.5"],
        ["--gpu-memory-utilization"],
        ["--max-num-batched-tokens", "1"],
        ["--kv-cache-memory-bytes", "0"],
        ["--num-gpu-blocks-override", "1"],
        ["--max-model-len", "1.5"],
    ],
)
def test_flags_that_the_server_would_refuse(arguments: list[str]) -> None:
    with pytest.raises(SpecError, match=rf"spec\.engine\.extraArgs: --{arguments[0].removeprefix('--')}"):
        read_engine_settings(deployment({"extraArgs": arguments}))


def test_a_cache_of_a_fixed_size_is_not_measured_by_the_share() -> None:
    small = {"maxModelLen": 4096, "extraArgs": ["--gpu-memory-utilization=0.01", "--kv-cache-memory-bytes=1G"]}
    assert judge(small, hardware("8Gi")).verdict.holds is True
    too_short = judge({"maxModelLen": 100_000, "extraArgs": ["--kv-cache-memory-bytes=1G"]}, hardware("8Gi"))
    assert too_short.verdict.holds is False
    assert "engine.extraArgs" in too_short.verdict.message
    too_large = judge({"maxModelLen": 4096, "extraArgs": ["--kv-cache-memory-bytes=16G"]}, hardware("8Gi"))
    assert too_large.verdict.holds is False
    assert "has 8.0 GiB" in too_large.verdict.message
    by_blocks = judge({"maxModelLen": 4096, "extraArgs": ["--num-gpu-blocks-override=257"]}, hardware("8Gi"))
    assert by_blocks.verdict.holds is True
    assert judge(
        {"maxModelLen": 4097, "extraArgs": ["--num-gpu-blocks-override=257"]}, hardware("8Gi")
    ).verdict.holds is False  # fmt: skip


def test_target_pending_per_replica() -> None:
    settings = read_engine_settings(deployment({"maxNumSeqs": 64}))
    request = FitRequest(
        shape=shape_of_config(LLAMA),
        memory_bytes=80 * GIB,
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )
    roomy, tight = check_fit(request), check_fit(replace(request, memory_bytes=4 * GIB))
    assert target_pending_per_replica(deployment({}), settings, None) == 51
    assert target_pending_per_replica(deployment({}), settings, roomy) == 51
    assert 1 < tight.max_concurrent_sequences < 51
    assert target_pending_per_replica(deployment({}), settings, tight) == tight.max_concurrent_sequences
    one = read_engine_settings(deployment({"maxNumSeqs": 1}))
    assert target_pending_per_replica(deployment({}), one, None) == 1
    given = deployment({}, scaling={"targetPendingPerReplica": 7})
    assert target_pending_per_replica(given, settings, tight) == 7
