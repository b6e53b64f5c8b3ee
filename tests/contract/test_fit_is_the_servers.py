"""What the operator foretells, a server does: from the facts that cross to it, against engines that really start.

Expected numbers come from `transformers`' parameters, from the tensors that a loaded model and its cache hold, and from
what starts and what does not.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import quire_kernels
from quire_contract.memory.fit import FitReport, FitRequest, check_fit, device_memory, stage_layers
from quire_contract.memory.model_shape import ModelShape
from quire_contract.model_facts import decode_facts, encode_facts
from quire_server.download.facts import read_facts
from quire_server.engine.request import EngineRequest
from quire_server.engine_process.startup import StartedEngine, start_engine
from quire_server.models import free_memory
from quire_server.models.decoder import DecoderModel
from quire_server.models.loader import load_model
from quire_server.models.modules.rope_table import RopeTable, RopeTables
from quire_server.models.planning.sharding import WHOLE, ModelShare
from quire_server.shared.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from quire_server.shared.errors import OutOfMemoryError
from quire_server.shared.sampling_params import SamplingParams
from quire_server.weights.checkpoint import open_checkpoint

# Multiples of 32, so that weights packed for bfloat16 kernels are not padded.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 64},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 32},
    "gemma": {**GROUPED, "head_dim": 32},
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 64},
    "opt": {**SIZES, "ffn_dim": 160, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox": SIZES,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_SIZE = 16
SETTINGS: dict[str, int] = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
WANTED_LEN = 100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Saved:
    """A model on the disk, and what the download Job says of it."""

    def __init__(self, path: Path, model_type: str) -> None:
        self.path = path
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **MODELS[model_type])
        self.reference = AutoModelForCausalLM.from_config(config)
        self.reference.save_pretrained(path)
        facts = decode_facts(encode_facts(read_facts(path, "m", None)))
        assert facts is not None
        assert facts.shape is not None, facts.shape_error
        self.shape: ModelShape = facts.shape

    def ask(self, memory_bytes: int, dtype: str = "float32", max_model_len: int | None = None) -> FitReport:
        """Ask as the operator does."""
        request = FitRequest(
            shape=self.shape,
            memory_bytes=memory_bytes,
            gpu_memory_utilization=1.0,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=BLOCK_SIZE,
            **SETTINGS,
        )
        return check_fit(request)

    def start(self, dtype: str = "float32", max_model_len: int | None = None) -> StartedEngine:
        config = EngineConfig(
            model=ModelConfig(
                model="m", path=self.path, served_model_names=("m",), dtype=dtype, max_model_len=max_model_len
            ),
            cache=CacheConfig(block_size=BLOCK_SIZE, gpu_memory_utilization=1.0),
            scheduler=SchedulerConfig(**SETTINGS),
            device="cpu",
            num_threads=1,
        )
        return start_engine(config, on_progress=lambda _: None)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def give_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the machine have so much memory."""
    return lambda num_bytes: monkeypatch.setattr(free_memory, "available_memory_bytes", lambda: num_bytes)


def held_tensors(root: object) -> dict[int, torch.Tensor]:
    """Every tensor that an object leads to, by address; but for tables of positions, which are no weights."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    pending = [root]
    while pending:
        current = pending.pop()
        if id(current) in seen or isinstance(current, RopeTables | RopeTable | type):
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor):
            found[current.data_ptr()] = current
        elif isinstance(current, tuple | list):
            pending.extend(current)
        elif type(current).__module__.startswith("quire_"):
            slots = [name for kind in type(current).__mro__ for name in getattr(kind, "__slots__", ())]
            pending.extend(getattr(current, name) for name in (*slots, *getattr(current, "__dict__", ())))
    return found


def held_storages(root: object) -> dict[int, int]:
    """The bytes of all that tensors keep alive, by address: a view of a part keeps the whole."""
    storages = [tensor.untyped_storage() for tensor in held_tensors(root).values()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def load(saved: Saved, dtype: str, share: ModelShare = WHOLE) -> DecoderModel:
    return load_model(
        open_checkpoint(saved.path),
        dtype=DTYPES[dtype],
        device=torch.device("cpu"),
        on_progress=lambda _: None,
        share=share,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(saved: Saved, dtype: str) -> None:
    foretold = saved.ask(1 << 40, dtype).weights_bytes
    expected = sum(
        parameter.numel() * (4 if "norm" in name else DTYPES[dtype].itemsize)
        for name, parameter in saved.reference.named_parameters()
    )
    assert foretold == expected
    model = load(saved, dtype)
    assert model.num_parameter_bytes == expected
    assert sum(tensor.nbytes for tensor in held_tensors(model).values()) == expected


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_weights_of_ranks_and_stages(saved: Saved, num_ranks: int, num_stages: int) -> None:
    """The device of a stage that holds most is foretold, whichever rank it is."""
    request = FitRequest(
        shape=saved.shape,
        memory_bytes=0,
        dtype="float32",
        tensor_parallel_size=num_ranks,
        pipeline_parallel_size=num_stages,
        **SETTINGS,
    )
    for stage, layers in enumerate(stage_layers(saved.shape.num_layers, num_stages)):
        models = [
            load(saved, "float32", ModelShare(rank=rank, world_size=num_ranks, layers=layers))
            for rank in range(num_ranks)
        ]
        counted = [model.num_parameter_bytes for model in models]
        assert device_memory(request, stage).weights_bytes == max(counted)
        assert [sum(held_storages(model).values()) for model in models] == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_enough_memory_starts_and_a_byte_less_does_not(saved: Saved, dtype: str, give_memory: Any) -> None:
    need = saved.ask(0, dtype, WANTED_LEN).need_bytes
    report = saved.ask(need, dtype, WANTED_LEN)
    assert (report.fits, report.max_concurrent_sequences) == (True, 1)
    give_memory(need)
    engine = saved.start(dtype, WANTED_LEN)
    assert engine.info.max_model_len == WANTED_LEN
    assert engine.info.num_blocks * BLOCK_SIZE == report.kv_capacity_tokens
    assert fill_to(engine, WANTED_LEN) == WANTED_LEN

    assert not saved.ask(need - 1, dtype, WANTED_LEN).fits
    give_memory(need - 1)
    with pytest.raises(OutOfMemoryError):
        saved.start(dtype, WANTED_LEN)


@pytest.mark.parametrize("num_blocks", [2, 3, 9])
def test_the_largest_context(saved: Saved, num_blocks: int, give_memory: Any) -> None:
    """A length that nobody demanded is what the cache holds; a demanded one may be as long, and no longer."""
    smallest = saved.ask(0, max_model_len=1)
    block_bytes = saved.ask(0, max_model_len=BLOCK_SIZE + 1).need_bytes - smallest.need_bytes
    given = smallest.need_bytes + (num_blocks - 1) * block_bytes + block_bytes // 2
    report = saved.ask(given)
    assert (report.kv_capacity_tokens, report.max_model_len) == (num_blocks * BLOCK_SIZE,) * 2
    give_memory(given)
    engine = saved.start()
    assert (engine.info.max_model_len, engine.info.num_blocks) == (report.max_model_len, num_blocks)
    assert fill_to(engine, report.max_model_len) == report.max_model_len
    saved.start(max_model_len=report.max_model_len)
    with pytest.raises(OutOfMemoryError, match="max_model_len"):
        saved.start(max_model_len=report.max_model_len + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_holds_what_is_counted(saved: Saved, dtype: str, give_memory: Any) -> None:
    report = saved.ask(1 << 30, dtype)
    give_memory(1 << 30)
    engine = saved.start(dtype)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held_tensors(engine.core).values()
        if tensor.dim() == 4 and tensor.shape[1] == BLOCK_SIZE
    }
    num_tokens = (engine.info.num_blocks + 1) * BLOCK_SIZE
    assert list(storages.values()) == [num_tokens * report.kv_bytes_per_token] == [engine.info.kv_cache_bytes]
    # The least that any implementation could keep: `transformers` keeps as much per token.
    cache = saved.reference(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert report.kv_bytes_per_token * 5 == kept * DTYPES[dtype].itemsize


def fill_to(engine: StartedEngine, num_tokens: int) -> int:
    """Run one sequence to its largest length; return the tokens that it has then."""
    prompt = list(range(1, num_tokens // 2))
    engine.core.add_request(
        EngineRequest(
            request_id="r",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=num_tokens - len(prompt), ignore_eos=True),
        )
    )
    num_made = 0
    while engine.core.has_unfinished:
        num_made += sum(len(output.new_token_ids) for output in engine.core.step(now=0.0))
    return len(prompt) + num_made


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 5, "prompt_logprobs": 5},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_step_holds_more_than_the_workspace(
    saved: Saved, dtype: str, params: str, give_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in live tensors, over steps as large as they get. Attention leaves its result alone: what it needs inside
    is native code's, or, of its slow twin, all scores at once, which nobody plans for."""
    give_memory(1 << 30)
    engine = saved.start(dtype)
    monkeypatch.setattr(quire_kernels, "paged_attention", lambda query, *_, **__: torch.zeros_like(query))
    for index in range(SETTINGS["max_num_seqs"]):
        request = EngineRequest(
            request_id=f"r{index}",
            prompt_token_ids=list(range(1, SETTINGS["max_num_batched_tokens"])),
            params=SamplingParams(max_tokens=3, ignore_eos=True, **PARAMS[params]),
        )
        engine.core.add_request(request)
    with LiveBytes() as live:
        while engine.core.has_unfinished:
            engine.core.step(now=0.0)
    widest = SETTINGS["max_num_batched_tokens"] * SIZES["hidden_size"] * DTYPES[dtype].itemsize
    assert widest < live.peak <= saved.ask(1 << 30, dtype).workspace_bytes


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operators made and that is still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in((args, kwargs))}
        for tensor in _tensors_in(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, address: int) -> None:
        self._now -= self._sizes.pop(address)


def _tensors_in(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
