"""Whatever goes wrong, the client gets OpenAI's error body with the right status; and who may ask at all."""

import pytest

from quire_contract.phases import Phase
from quire_contract.termination import TerminationMessage
from quire_server.engine.border.messages import EngineFailed, EngineProgress
from quire_server.engine.request import FinishReason
from quire_server.shared.errors import DrainingError

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"nul", b"\xff\xfe", b'{"model": "\xff"}', b'{"messages": [] '])
async def test_bad_json(world, check_error, body):
    check_error(await world.http.post(CHAT, content=body), 400)


async def test_wrong_content_type(world, check_error):
    response = await world.http.post(
        CHAT, content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert "Content-Type" in check_error(response, 400)


async def test_missing_field(world, check_error):
    assert "messages" in check_error(await world.http.post(CHAT, json={}), 400, param="messages")


async def test_unknown_model(world, check_error):
    message = check_error(await world.chat(model="gpt-4"), 404, param="model", reason="model_not_found")
    assert message == "The model `gpt-4` does not exist."


async def test_unknown_path_and_method(world, check_error):
    check_error(await world.http.get("/v1/nothing"), 404)
    response = await world.http.get(CHAT)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


async def test_token_ids_out_of_vocabulary(world, check_error):
    assert "300" in check_error(await world.complete(prompt=[1, 300]), 400, param="prompt")
    check_error(await world.complete(prompt=[-1]), 400, param="prompt")
    check_error(await world.http.post("/detokenize", json={"tokens": [300]}), 400, param="tokens")


@pytest.mark.parametrize("is_declared", [True, False])
async def test_large_bodies(build_world, check_error, is_declared):
    world = build_world(max_request_body_bytes=1000)
    world.load()
    world.engine.answer("x")
    assert (await world.chat()).status_code == 200

    async def pieces():
        for _ in range(20):
            yield b" " * 100

    content = b" " * 2000 if is_declared else pieces()
    response = await world.http.post(CHAT, content=content)
    check_error(response, 413, reason="payload_too_large")


async def test_full_queue(build_world, check_error):
    world = build_world(scheduler={"max_num_queued_reqs": 1, "max_num_seqs": 1})
    world.load()
    body = {"messages": [{"role": "user", "content": "hi"}]}
    held = [world.exchange(CHAT, body) for _ in range(2)]
    await world.engine.next_request(1)
    for stream in (False, True):
        response = await world.chat(stream=stream)
        check_error(response, 429, reason="queue_full")
        assert int(response.headers["retry-after"]) >= 1
    for exchange in held:
        await exchange.hang_up()


async def test_loading(build_world, check_error):
    world = build_world()
    for post in (world.chat, world.complete):
        response = await post()
        check_error(response, 503, reason="model_loading")
        assert int(response.headers["retry-after"]) >= 1
    check_error(await world.http.post("/tokenize", json={"prompt": "x"}), 503, reason="model_loading")
    assert (await world.http.get("/v1/models")).status_code == 200


async def test_draining(world, check_error):
    world.engine.begin_drain()
    response = await world.chat()
    check_error(response, 503, reason="draining")
    assert int(response.headers["retry-after"]) >= 1


async def test_dead_engine(world, check_error):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    waiting = world.exchange(CHAT, body)
    await world.engine.next_request()
    world.engine._dispatch(EngineFailed(TerminationMessage(code="Bug", stage="Serving", message="It broke.")))
    assert (await waiting.next_message())["status"] == 500
    assert b'"code":500,"reason":"engine_dead"' in (await waiting.next_message())["body"]
    assert "It broke." in check_error(await world.chat(), 500, reason="engine_dead")


@pytest.mark.parametrize("error", ["death", "drain"])
async def test_errors_after_the_start_of_a_stream_are_events(world, error):
    exchange = world.exchange(CHAT, {"messages": [{"role": "user", "content": "hi"}], "stream": True})
    request = await world.engine.next_request()
    assert (await exchange.next_message())["status"] == 200
    world.engine.emit(world.engine.output(request, "so far"))
    assert b"so far" in (await exchange.next_message())["body"]
    if error == "death":
        world.engine._dispatch(EngineFailed(TerminationMessage(code="Bug", stage="Serving", message="It broke.")))
    else:
        world.engine.fail_open_requests(DrainingError("Shut down."))
    event = (await exchange.next_message())["body"]
    assert event.startswith(b'data: {"error":{"message":')
    assert (b"engine_dead" if error == "death" else b"draining") in event
    assert (await exchange.next_message())["body"] == b"data: [DONE]\n\n"
    assert (await exchange.next_message()) == {"type": "http.response.body", "body": b"", "more_body": False}
    await exchange.task


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_ends_the_others(world, stream):
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": stream}
    exchange = world.exchange(CHAT, body)
    second = await world.engine.next_request(1)
    world.engine.emit(world.engine.output(second, finish_reason=FinishReason.ERROR))
    await exchange.task
    assert (await exchange.next_message())["status"] == (200 if stream else 500)
    assert b'{"error":{' in (await exchange.next_message())["body"]
    assert world.engine.aborted == [world.engine.requests[0].request_id]
    assert world.engine.num_open_requests == 0
    metrics = (await world.http.get("/metrics")).text
    for reason in ("abort", "error"):
        assert f'vllm:request_success_total{{model_name="tiny",engine="0",finished_reason="{reason}"}} 1.0' in metrics


async def test_a_bug_is_a_500_without_its_details(world, check_error):
    def script(request):
        raise AssertionError

    world.frontend.client.generate = script
    message = check_error(await world.chat(), 500)
    assert message == "Internal server error."


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
        ("one", 401),
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer onetwo", 401),
    ],
)
async def test_keys(build_world, check_error, header, status):
    world = build_world(api_keys=("one", "two"))
    world.load()
    headers = {} if header is None else {"authorization": header}
    for method, path, body in [
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [1]}),
    ]:
        response = await world.http.request(method, path, json=body, headers=headers)
        if status == 401:
            check_error(response, 401, reason="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        else:
            assert response.status_code == 200
    for path in ("/health", "/livez", "/readyz", "/metrics", "/version", "/openapi.json"):
        assert (await world.http.get(path, headers=headers)).status_code == 200


async def test_cors(build_world):
    world = build_world(allowed_origins=("https://ui.example",), api_keys=("k",))
    ask = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    response = await world.http.options(CHAT, headers=ask)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://ui.example"
    refused = await world.http.post(CHAT, json={}, headers={"origin": "https://ui.example"})
    assert refused.headers["access-control-allow-origin"] == "https://ui.example"
    assert (await world.http.options(CHAT, headers={**ask, "origin": "https://other"})).status_code == 400


@pytest.mark.parametrize("is_echoed", [True, False])
async def test_request_ids(build_world, is_echoed):
    world = build_world(enable_request_id_headers=is_echoed)
    world.load()
    world.engine.answer("x")
    response = await world.http.post(
        CHAT, json={"messages": [{"role": "user", "content": "x"}]}, headers={"X-Request-Id": "abc"}
    )
    assert response.json()["id"] == "chatcmpl-abc"
    assert response.headers.get("x-request-id") == ("abc" if is_echoed else None)
    response = await world.chat()
    if is_echoed:
        assert response.json()["id"] == f"chatcmpl-{response.headers['x-request-id']}"
        assert (await world.http.get("/nothing")).headers["x-request-id"]


async def test_probes_through_a_life(build_world):
    world = build_world()

    async def probe(path):
        response = await world.http.get(path)
        return response.status_code, response

    async def statuses():
        return [(await probe(path))[0] for path in ("/livez", "/readyz", "/health", "/ping", "/metrics")]

    assert await statuses() == [200, 503, 503, 503, 200]
    world.engine._dispatch(EngineProgress(phase=Phase.LOADING, message="Reading weights", percent=40.0))
    assert (await probe("/readyz"))[1].json() == {"phase": "Loading", "message": "Reading weights", "percent": 40.0}
    world.load()
    assert await statuses() == [200, 200, 200, 200, 200]
    assert (await probe("/readyz"))[1].json() == {"phase": "Ready"}
    assert (await probe("/health"))[1].content == b""
    world.engine.begin_drain()
    assert await statuses() == [200, 503, 200, 200, 200]
    assert (await probe("/readyz"))[1].json()["phase"] == "Draining"
    world.engine._dispatch(EngineFailed(TerminationMessage(code="Bug", stage="Serving", message="It broke.")))
    assert await statuses() == [503, 503, 503, 503, 200]
    assert (await probe("/livez"))[1].text == "Bug: It broke."
    assert (await probe("/readyz"))[1].json()["phase"] == "Failed"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [1, 300]}, "prompt"),
        ("/v1/completions", {"prompt": "hi", "stop_token_ids": [300]}, "stop_token_ids"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
    ],
)
async def test_a_token_id_out_of_the_vocabulary_is_refused_in_these_words(world, check_error, path, body, param):
    message = check_error(await world.http.post(path, json=body), 400, param=param)
    assert message == "Token id 300 is out of vocabulary: ids are in [0, 300)."


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("field", ["metadata", "chat_template_kwargs", "not_a_field", "prompt"])
async def test_a_body_that_is_nested_deeply(world, check_error, path, field):
    body = f'{{"{field}": {NESTED}, "messages": [], "tokens": []}}'
    response = await world.http.post(path, content=body, headers={"content-type": "application/json"})
    check_error(response, 400, param=response.json()["error"]["param"])


@pytest.mark.parametrize("field", ["chat_template_kwargs", "arguments"])
async def test_what_the_decoder_can_just_read_and_others_after_it_cannot(world, field):
    world.engine.answer("x")
    statuses = []
    for depth in (*range(800, 1000, 2), 100_000):
        deep = "[" * depth + "]" * depth
        kwargs = f'{{"mood": {deep if field == "chat_template_kwargs" else 1}}}'
        call = f'{{"function": {{"name": "f", "arguments": {deep if field == "arguments" else 1}}}}}'
        messages = f'[{{"role": "assistant", "content": "a", "tool_calls": [{call}]}}]'
        body = f'{{"messages": {messages}, "chat_template_kwargs": {kwargs}}}'
        response = await world.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        statuses.append(response.status_code)
    assert statuses == [200] * statuses.count(200) + [400] * statuses.count(400)
    assert statuses[-1] == 400


async def test_arguments_of_a_call_that_are_nested_deeply(world, check_error):
    call = {"function": {"name": "f", "arguments": NESTED}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    assert "nested" in check_error(await world.chat(messages=messages), 400, param="messages")
