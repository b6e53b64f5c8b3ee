"""/v1/models, /tokenize, /detokenize, /version and /metrics."""

import pytest
from tiny_model import save_byte_tokenizer
from tokenizers import Tokenizer

pytestmark = pytest.mark.anyio


async def test_models(world, check_error):
    body = (await world.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "alias"]
    card = body["data"][0]
    assert (card["object"], card["owned_by"], card["root"], card["parent"]) == ("model", "quire", "org/tiny", None)
    assert card["max_model_len"] == 256
    assert (await world.http.get("/v1/models/alias")).json()["id"] == "alias"
    check_error(await world.http.get("/v1/models/org/other"), 404, param="model", reason="model_not_found")


async def test_tokenize_text(world):
    body = (await world.http.post("/tokenize", json={"prompt": "né is"})).json()
    ids = world.tokenizer.encode("né is")
    assert body == {"count": 6, "max_model_len": 256, "tokens": ids, "token_strs": None}


@pytest.mark.parametrize("body", [{"prompt": "né is<|im_end|>"}, {"messages": [{"role": "user", "content": "né is"}]}])
async def test_token_strings_are_the_vocabularys(world, tmp_path, body):
    """vLLM's `convert_ids_to_tokens`; the judge is `tokenizers` on the same file."""
    save_byte_tokenizer(tmp_path)
    judge = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    body = (await world.http.post("/tokenize", json={**body, "return_token_strs": "true"})).json()
    assert body["token_strs"] == [judge.id_to_token(token_id) for token_id in body["tokens"]]
    assert "".join(body["token_strs"]).count("nÃ©Ġis<|im_end|>") == 1


async def test_tokenize_conversation(world):
    messages = [{"role": "user", "content": "hi"}]
    body = (await world.http.post("/tokenize", json={"messages": messages})).json()
    world.engine.answer("x")
    await world.chat(messages=messages)
    assert body["tokens"] == world.engine.requests[0].prompt_token_ids
    assert body["token_strs"] is None
    shorter = (await world.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert shorter["count"] < body["count"]


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}])
async def test_tokenize_wants_one_of_two(world, check_error, body):
    check_error(await world.http.post("/tokenize", json=body), 400, param="prompt")


async def test_detokenize(world):
    ids = world.tokenizer.encode("<|im_start|>né")
    response = await world.http.post("/detokenize", json={"tokens": ids, "model": "tiny"})
    assert response.json() == {"prompt": "<|im_start|>né"}


async def test_version(world):
    assert (await world.http.get("/version")).json()["version"]


async def test_metrics_count_requests(world):
    world.engine.answer("abc", num_cached_tokens=1)
    await world.complete(prompt="hello")
    response = await world.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    labels = '{model_name="tiny",engine="0"}'
    assert f"vllm:prompt_tokens_total{labels} 5.0" in response.text
    assert f"vllm:generation_tokens_total{labels} 3.0" in response.text
    assert f"vllm:e2e_request_latency_seconds_count{labels} 1.0" in response.text
