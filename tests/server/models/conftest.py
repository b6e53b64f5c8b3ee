"""Tiny random models by `transformers`, and a harness that drives a `DecoderModel` over a paged cache."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quire_server.models.attention import AttentionMetadata, KVCache
from quire_server.models.decoder import DecoderModel
from quire_server.models.loader import load_model, load_plan
from quire_server.models.planning.linear_method import select_method_for
from quire_server.models.planning.parts import MethodFor
from quire_server.models.planning.plan import build_plan
from quire_server.models.planning.spec import DecoderSpec, KVShape
from quire_server.models.planning.weight_map import WeightMap
from quire_server.models.reader import CheckpointReader
from quire_server.weights.checkpoint import lookup_in, open_checkpoint

VOCAB_SIZE = 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class CachedSequence:
    """One sequence in the cache."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class PagedHarness:
    """What a runner does, in its simplest form: blocks in random order, unused slots full of NaN."""

    def __init__(self, model: DecoderModel, *, block_size: int = 4, num_blocks: int = 128, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        stage = [model.spec.layers[index] for index in model.share.stage(model.spec.num_layers)]
        self.kv_caches = [self._allocate(layer.attention.kv_shape, num_blocks) for layer in stage]
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()

    def _allocate(self, kept: KVShape, num_blocks: int) -> KVCache:
        shape = (num_blocks, self.block_size, kept.num_kv_heads)
        return KVCache(
            torch.full((*shape, kept.key_dim), torch.nan, dtype=self.model.dtype),
            torch.full((*shape, kept.value_dim), torch.nan, dtype=self.model.dtype),
        )

    def step(self, scheduled: Sequence[tuple[CachedSequence, int]]) -> Tensor:  # [num_tokens, vocab_size]
        """Run the next `n` tokens of each sequence in one batch; return the logits of every one."""
        return self.model.compute_logits(self.model.forward(*self.prepare(scheduled), self.kv_caches))

    def prefill_hidden(
        self, tokens: Sequence[int], inputs_embeds: Tensor | None = None
    ) -> Tensor:  # [num_tokens, hidden_size]
        """Run a prompt; return the hidden states. With `inputs_embeds` the model is not told the tokens."""
        token_ids, *where = self.prepare([(CachedSequence(list(tokens)), len(tokens))])
        ids = token_ids if inputs_embeds is None else None
        return self.model.forward(ids, *where, self.kv_caches, inputs_embeds=inputs_embeds)

    def prefill_with_states(
        self, tokens: Sequence[int], state_layers: Sequence[int], inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:  # [num_tokens, hidden_size], all
        """Run a prompt; return the hidden states after the last layer, and after those asked for."""
        token_ids, *where = self.prepare([(CachedSequence(list(tokens)), len(tokens))])
        ids = token_ids if inputs_embeds is None else None
        return self.model.forward_with_states(
            ids, *where, self.kv_caches, state_layers=state_layers, inputs_embeds=inputs_embeds
        )

    def prepare(self, scheduled: Sequence[tuple[CachedSequence, int]]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """Give tokens their slots; return what `forward` takes beside the caches."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, num_tokens in scheduled:
            end = sequence.num_computed_tokens + num_tokens
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self.free.pop())
            for position in range(sequence.num_computed_tokens, end):
                token_ids.append(sequence.tokens[position])
                positions.append(position)
                slots.append(
                    sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size
                )
            sequence.num_computed_tokens = end
            starts.append(len(token_ids))
        width = max(len(sequence.blocks) for sequence, _ in scheduled)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([sequence.num_computed_tokens for sequence, _ in scheduled], dtype=torch.int32),
            block_table=torch.tensor(
                [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in scheduled], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
        )
        return torch.tensor(token_ids), torch.tensor(positions), metadata

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:  # [num_tokens, vocab_size]
        """Run a prompt, whole or in chunks; return the logits at every position."""
        sequence = CachedSequence(list(tokens))
        step = chunk or len(tokens)
        sizes = [min(step, len(tokens) - start) for start in range(0, len(tokens), step)]
        return torch.cat([self.step([(sequence, size)]) for size in sizes])

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Prefill all prompts in one batch, then decode them together."""
        sequences = [CachedSequence(list(prompt)) for prompt in prompts]
        scheduled = [(sequence, len(sequence.tokens)) for sequence in sequences]
        for _ in range(num_tokens):
            logits = self.step(scheduled)
            ends = torch.tensor([num for _, num in scheduled]).cumsum(0) - 1
            for sequence, token in zip(sequences, logits[ends].argmax(-1).tolist(), strict=True):
                sequence.tokens.append(token)
            scheduled = [(sequence, 1) for sequence in sequences]
        return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


@dataclass
class TinyModel:
    """The same weights in `transformers` and on disk."""

    reference: Any
    path: Path

    def reference_logits(self, tokens: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.reference(torch.tensor([list(tokens)])).logits[0]
        return logits

    def reference_greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        prompt = torch.tensor([list(tokens)])
        with torch.inference_mode():
            out = self.reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answer: list[int] = out[0, len(tokens) :].tolist()
        return answer

    def edit_config(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Change config.json in place; the weights stay."""
        path = self.path / "config.json"
        config = json.loads(path.read_text())
        edit(config)
        path.write_text(json.dumps(config))

    def load(self, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> DecoderModel:
        return load_model(
            open_checkpoint(self.path),
            dtype=dtype,
            device=torch.device("cpu"),
            on_progress=lambda share: None,
            **arguments,
        )

    def load_as(
        self,
        spec: DecoderSpec,
        weights: WeightMap,
        *,
        dtype: torch.dtype = torch.float32,
        method_for: MethodFor | None = None,
        **arguments: Any,
    ) -> DecoderModel:
        """Load the checkpoint by a spec, names and methods of the test's own."""
        checkpoint = open_checkpoint(self.path)
        reader = CheckpointReader(checkpoint, weights.aliases, dtype, torch.device("cpu"))
        plan = build_plan(spec, weights, method_for or select_method_for({}), lookup_in(checkpoint))
        return load_plan(plan, reader, on_progress=lambda share: None, **arguments)


def randomise(model: Any, seed: int) -> None:
    """Weights large enough that a wrong rotation, norm, bias or window shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    is_gemma = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(0.0 if is_gemma else 1.0, 0.3, generator=generator)
            else:
                is_tied = "embed" in name and model.config.tie_word_embeddings
                is_table = "embed" in name and not is_tied
                parameter.normal_(0.0, 1.0 if is_table else 0.1 if is_gemma and is_tied else 0.2, generator=generator)


@pytest.fixture
def build_tiny_model(tmp_path: Path) -> Callable[..., TinyModel]:
    """Build a random model from a `model_type` and config fields, and save it."""

    def build(model_type: str, *, seed: int = 0, **fields: Any) -> TinyModel:
        defaults = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(model_type, **defaults | fields)
        reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(reference, seed)
        path = tmp_path / f"{model_type}-{seed}"
        reference.save_pretrained(path)
        return TinyModel(reference, path)

    return build


@pytest.fixture
def rewrite_tensors() -> Callable[..., None]:
    """Change the tensors of a tiny model's file; `transformers` keeps its own."""

    def rewrite(tiny: TinyModel, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        file = tiny.path / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(change(tensors), file, metadata={"format": "pt"})

    return rewrite


def random_prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    tokens: list[int] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
    return tokens


@pytest.fixture
def harness() -> type[PagedHarness]:
    return PagedHarness


@pytest.fixture
def prompt_of() -> Callable[[int], list[int]]:
    return random_prompt
