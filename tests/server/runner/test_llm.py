"""Offline inference, end to end on a tiny checkpoint."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from quire_server import LLM, SamplingParams
from quire_server.shared.errors import CheckpointError, ConfigError, ContextLengthError, InvalidRequestError

PROMPT = "A quire is"
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(llama_checkpoint: Path) -> LLM:
    return LLM(str(llama_checkpoint), dtype="float32", block_size=4, max_num_seqs=4, num_threads=1)


@pytest.fixture(scope="module")
def answer(llama_checkpoint: Path) -> list[int]:
    """Ten greedy tokens after the prompt, by recomputation."""
    model = LlamaForCausalLM.from_pretrained(llama_checkpoint, dtype=torch.float32).eval()
    tokens = tokens_of(PROMPT)
    with torch.inference_mode():
        for _ in range(10):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def tokens_of(text: str) -> list[int]:
    """What the checkpoint's tokenizer makes of ASCII: one token per byte, in the order of GPT-2's alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index({" ": "Ġ"}.get(each, each)) for each in text]


def test_every_kind_of_prompt(llm: LLM, answer: list[int]) -> None:
    token_ids = tokens_of(PROMPT)
    results = llm.generate(
        [PROMPT, token_ids, {"prompt": PROMPT}, {"prompt_token_ids": token_ids}], GREEDY, use_tqdm=False
    )
    for result in results:
        assert result.finished
        assert result.prompt_token_ids == token_ids
        assert result.outputs[0].token_ids == answer
        assert result.outputs[0].finish_reason == "length"
        assert result.outputs[0].text == llm.get_tokenizer().decode(answer)
    assert [result.prompt for result in results] == [PROMPT, None, PROMPT, None]
    assert len({result.request_id for result in results}) == 4


@pytest.mark.parametrize("prompt", [PROMPT, {"prompt": PROMPT}, tokens_of(PROMPT)], ids=["text", "mapping", "tokens"])
def test_one_prompt_alone(llm: LLM, answer: list[int], prompt: str | list[int]) -> None:
    (result,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert result.outputs[0].token_ids == answer


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_each_prompt_has_its_own_parameters(llm: LLM, answer: list[int]) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=length) for length in (3, 7, 1)]
    results = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [3, 7, 1]
    with pytest.raises(InvalidRequestError, match="3 entries for 2 prompts"):
        llm.generate([PROMPT] * 2, params, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="0 entries for 1 prompts"):
        llm.generate([PROMPT], [], use_tqdm=False)


def test_a_stop_string_ends_an_answer(llm: LLM, answer: list[int]) -> None:
    text = llm.get_tokenizer().decode(answer)
    stop = text[4]
    (result,) = llm.generate(PROMPT, dataclasses.replace(GREEDY, stop=(stop,)), use_tqdm=False)
    (output,) = result.outputs
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) < len(answer)


def test_a_stop_token_ends_an_answer(llm: LLM, answer: list[int]) -> None:
    stop = answer[2]
    (result,) = llm.generate(PROMPT, dataclasses.replace(GREEDY, stop_token_ids=(stop,)), use_tqdm=False)
    (output,) = result.outputs
    assert output.token_ids == answer[: answer.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_several_answers(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=5.0, seed=40, max_tokens=12, ignore_eos=True)
    (together,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert [output.index for output in together.outputs] == [0, 1, 2]
    alone = [
        llm.generate(PROMPT, dataclasses.replace(params, n=1, seed=40 + index), use_tqdm=False)[0].outputs[0].token_ids
        for index in range(3)
    ]
    assert [output.token_ids for output in together.outputs] == alone
    assert len({tuple(token_ids) for token_ids in alone}) == 3


def test_seeds_wrap_in_64_bits(llm: LLM) -> None:
    """Above the highest signed one comes the lowest, which has the bits of 2**63."""

    def ask(**fields: Any) -> list[list[int]]:
        params = SamplingParams(temperature=5.0, max_tokens=12, ignore_eos=True, **fields)
        return [each.token_ids for each in llm.generate(PROMPT, params, use_tqdm=False)[0].outputs]

    both = ask(n=2, seed=2**63 - 1)
    assert both == ask(seed=2**63 - 1) + ask(seed=2**63)
    assert both[1:] == ask(seed=-(2**63))
    assert both[0] != both[1]


def test_without_a_seed_answers_differ_and_runs_repeat(llama_checkpoint: Path) -> None:
    params = SamplingParams(temperature=5.0, max_tokens=12, ignore_eos=True)

    def answers(seed: int) -> list[list[int]]:
        llm = LLM(str(llama_checkpoint), dtype="float32", max_num_seqs=4, num_threads=1, seed=seed)
        return [result.outputs[0].token_ids for result in llm.generate([PROMPT] * 2, params, use_tqdm=False)]

    first, second = answers(0)
    assert first != second
    assert answers(0) == [first, second]
    assert answers(1) != [first, second]


def test_logprobs(llm: LLM, answer: list[int]) -> None:
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=1)
    (result,) = llm.generate(PROMPT, params, use_tqdm=False)
    (output,) = result.outputs
    assert output.logprobs is not None
    assert len(output.logprobs) == 10
    for token_id, position in zip(answer, output.logprobs, strict=True):
        assert len(position) == 3
        assert position[token_id].rank == 1
        assert position[token_id].logprob == max(each.logprob for each in position.values())
        assert position[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
    chosen = [position[token_id].logprob for token_id, position in zip(answer, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    scored = zip(tokens_of(PROMPT)[1:], result.prompt_logprobs[1:], strict=True)
    assert all(position is not None and token_id in position for token_id, position in scored)


@pytest.mark.parametrize("length", [1, 2, 127, 128])
def test_no_tokens_score_the_prompt_up_to_the_whole_context(llama_checkpoint: Path, llm: LLM, length: int) -> None:
    prompt = [(11 * position) % 256 for position in range(length)]
    (result,) = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    (output,) = result.outputs
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
    model = LlamaForCausalLM.from_pretrained(llama_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logprobs[position, token_id]) for position, token_id in enumerate(prompt[1:])]
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    scored = [
        each[token_id].logprob for token_id, each in zip(prompt[1:], result.prompt_logprobs[1:], strict=True) if each
    ]
    assert scored == pytest.approx(expected, abs=1e-4)


def test_the_prefix_cache_is_used_and_can_be_reset(llm: LLM) -> None:
    prompt = list(range(60, 100))
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 36
    llm.reset_prefix_cache()
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (result,) = llm.chat(messages, GREEDY, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(result.prompt_token_ids, skip_special_tokens=False) == "<|user|>Hi<|end|><|assistant|>"
    assert len(result.outputs[0].token_ids) == 10
    two = llm.chat([messages, [*messages, {"role": "assistant", "content": "Ho"}]], GREEDY, use_tqdm=False)
    assert two[0].outputs[0].token_ids == result.outputs[0].token_ids
    assert len(two[1].prompt_token_ids) > len(two[0].prompt_token_ids)


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (result,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 128 - len(PROMPT)


def test_without_parameters_the_models_own_are_used(llama_checkpoint: Path, tmp_path: Path, llm: LLM) -> None:
    path = tmp_path / "with_defaults"
    shutil.copytree(llama_checkpoint, path)
    (path / "generation_config.json").write_text('{"top_k": 1, "max_new_tokens": 6, "eos_token_id": 256}')
    recommended = LLM(str(path), dtype="float32", max_num_seqs=4, num_threads=1)
    assert recommended.get_default_sampling_params() == SamplingParams(top_k=1, max_tokens=6)
    (result,) = recommended.generate(PROMPT, use_tqdm=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    assert result.outputs[0].token_ids == llm.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].token_ids


def test_a_models_own_faults_are_none_of_its_requests(
    llama_checkpoint: Path, tmp_path: Path, answer: list[int]
) -> None:
    path = tmp_path / "with_faults"
    shutil.copytree(llama_checkpoint, path)
    (path / "generation_config.json").write_text('{"temperature": "x", "top_p": 2, "eos_token_id": [100000, -1]}')
    (result,) = LLM(str(path), dtype="float32", num_threads=1).generate(PROMPT, GREEDY, use_tqdm=False)
    assert result.outputs[0].token_ids == answer


@pytest.mark.parametrize("max_model_len", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_shortest_contexts(llama_checkpoint: Path, max_model_len: int, block_size: int) -> None:
    llm = LLM(str(llama_checkpoint), dtype="float32", max_model_len=max_model_len, block_size=block_size, num_threads=1)
    if max_model_len == 1:
        with pytest.raises(ContextLengthError):
            llm.generate([[1]], GREEDY, use_tqdm=False)
    else:
        (result,) = llm.generate([[1]], GREEDY, use_tqdm=False)
        assert len(result.outputs[0].token_ids) == max_model_len - 1


def test_what_cannot_work_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.generate([[1] * 128], GREEDY, use_tqdm=False)
    with pytest.raises(ContextLengthError):
        llm.generate([[1] * 129], dataclasses.replace(GREEDY, max_tokens=0), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="264"):
        llm.generate([[264]], GREEDY, use_tqdm=False)
    assert not llm._core.has_unfinished


def test_a_refusal_by_the_engine_leaves_it_usable(llama_checkpoint: Path, answer: list[int]) -> None:
    llm = LLM(str(llama_checkpoint), dtype="float32", num_threads=1, max_num_seqs=4)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate([PROMPT, []], GREEDY, use_tqdm=False)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == answer


def test_progress_is_shown_when_asked_for(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([PROMPT] * 2, GREEDY, use_tqdm=False)
    assert "Prompts" not in capfd.readouterr().err
    llm.generate([PROMPT] * 2, GREEDY)
    assert "2/2" in capfd.readouterr().err


def test_errors_at_the_start(llama_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max-model-len"):
        LLM(str(llama_checkpoint), max_model_len=129)
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ({}, "'prompt' or 'prompt_token_ids'"),
        ({"text": "a"}, "'text'"),
        ({"prompt": 5}, "must be a text"),
        ({"prompt_token_ids": [1.0]}, "an integer"),
        ([1, 2.5], "an integer"),
        ([1, True], "an integer"),
        ([1, -4], "token id"),
        ([], "empty"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompt: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        llm.generate([prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("prompts", [None, 5, {"a", "b"}, b"text", (text for text in "ab")])
def test_what_are_no_prompts_is_refused_by_name(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"list of these, got {type(prompts).__name__}"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 1}, [{"max_tokens": 1}], [None], "greedy", 0.5, SamplingParams])
def test_what_are_no_parameters_is_refused_by_name(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params") as caught:
        llm.generate([PROMPT], params, use_tqdm=False)
    assert caught.value.param == "sampling_params"


@pytest.mark.parametrize("priority", ["1", 1.5, [None], [True]])
def test_what_is_no_priority_is_refused_by_name(llm: LLM, priority: Any) -> None:
    with pytest.raises(InvalidRequestError, match="priority must be an integer"):
        llm.generate([PROMPT], GREEDY, use_tqdm=False, priority=priority)


def test_one_stop_text_is_one_stop_text(llm: LLM, answer: list[int]) -> None:
    """Not each of its letters, of which the answer has one."""
    text = llm.get_tokenizer().decode(answer)
    stop = f"{text[3]}\0never"
    (result,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, stop=stop))
    assert result.outputs[0].text == text


def test_masks_that_leave_nothing_are_refused_before_anything_runs(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_ids
    with pytest.raises(InvalidRequestError, match="no token is left"):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=eos, min_tokens=1), use_tqdm=False)


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 3e38}, {"logit_bias": {65: -3.4e38, 66: -3.4e38}}])
def test_no_penalty_makes_an_allowed_token_impossible(llm: LLM, penalty: dict[str, Any]) -> None:
    allowed = (65, 66)
    params = SamplingParams(allowed_token_ids=allowed, max_tokens=8, ignore_eos=True, presence_penalty=2.0, **penalty)
    (result,) = llm.generate([[65, 66, 67]], params, use_tqdm=False)
    assert set(result.outputs[0].token_ids) <= set(allowed)
