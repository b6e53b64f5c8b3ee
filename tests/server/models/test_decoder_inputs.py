"""Embeddings in place of tokens, and hidden states of layers between, against `transformers`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire_server.models.planning.sharding import ModelShare

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
OPT = {name: LLAMA[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {"ffn_dim": 96}
OPT_350M = OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
GEMMA2 = LLAMA | {"head_dim": 16, "sliding_window": 8}
CASES = [
    pytest.param("llama", LLAMA, id="llama"),
    pytest.param("gemma2", GEMMA2, id="scaled-embedding"),
    pytest.param("opt", OPT, id="learned-positions"),
    pytest.param("opt", OPT_350M, id="projected"),
]


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_embeddings_stand_for_tokens(
    model_type: str,
    fields: dict[str, Any],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    """The first five are nobody's tokens, as of an image; the rest are looked up."""
    tiny = build_tiny_model(model_type, **fields)
    model, ids = tiny.load(), torch.tensor(prompt_of(20))
    embedded = tiny.reference.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(model.embed_tokens(ids), embedded)
    image = torch.randn(5, embedded.shape[1], generator=torch.Generator().manual_seed(0))
    embeds = torch.cat((image, embedded[5:]))
    before = embeds.clone()
    with torch.inference_mode():
        expected = tiny.reference(inputs_embeds=embeds[None]).logits[0]
    hidden = harness(model).prefill_hidden(ids.tolist(), inputs_embeds=embeds)
    torch.testing.assert_close(model.compute_logits(hidden), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(embeds, before)  # they are the caller's


@pytest.mark.parametrize(("model_type", "fields"), CASES)
@pytest.mark.parametrize("state_layers", [(0, 1), (1, 0), (1,), ()])
def test_hidden_states_between_layers(
    model_type: str,
    fields: dict[str, Any],
    state_layers: tuple[int, ...],
    build_tiny_model: Callable[..., Any],
    harness: Callable[..., Any],
    prompt_of: Callable[[int], list[int]],
) -> None:
    tiny = build_tiny_model(model_type, **fields)
    runner, tokens = harness(tiny.load()), prompt_of(20)
    with torch.inference_mode():
        reference = tiny.reference(torch.tensor([tokens]), output_hidden_states=True)
    states: list[Tensor]
    hidden, states = runner.prefill_with_states(tokens, state_layers)
    torch.testing.assert_close(runner.model.compute_logits(hidden), reference.logits[0], atol=1e-4, rtol=1e-4)
    assert len(states) == len(state_layers)
    for layer, state in zip(state_layers, states, strict=True):
        torch.testing.assert_close(state, reference.hidden_states[layer + 1][0], atol=1e-4, rtol=1e-4)


def test_a_later_stage_knows_its_layers_by_the_models_numbers(
    build_tiny_model: Callable[..., Any], harness: Callable[..., Any], prompt_of: Callable[[int], list[int]]
) -> None:
    tiny, tokens = build_tiny_model("llama", **LLAMA), prompt_of(20)
    first, last = (tiny.load(share=ModelShare(layers=range(*each))) for each in ((0, 1), (1, 3)))
    with torch.inference_mode():
        reference = tiny.reference(torch.tensor([tokens]), output_hidden_states=True)
    hidden = harness(first).prefill_hidden(tokens)
    result, [state] = harness(last).prefill_with_states(tokens, (1,), inputs_embeds=hidden)
    torch.testing.assert_close(state, reference.hidden_states[2][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.compute_logits(result), reference.logits[0], atol=1e-4, rtol=1e-4)
    for layer in (0, 3):
        with pytest.raises(ValueError, match="not all are of"):
            harness(last).prefill_with_states(tokens, (layer,), inputs_embeds=hidden)
