"""Bodies as clients write them. The judge of scalars is pydantic's lax mode, with which vLLM reads its requests."""

import logging

import pydantic
import pytest

from quire_server.api.bodies import lenient
from quire_server.api.bodies.ignored_fields import MAX_LOGGED_NAMES
from quire_server.api.bodies.lenient import MAX_NAME_LENGTH, MAX_NAMES

pytestmark = pytest.mark.anyio

HEADER = "x-quire-ignored-fields"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
SPELLINGS = [
    *(4, 4.0, 4.5, -1, 0, 1, 2, 0.0, 1.0, 0.5, True, False, [], {}, [4]),
    *("4", "4.0", "4.5", " 4 ", "+4", "0.5", "1e-1", "x", "", "yes", "No", "on", "off", "T", "f", "TRUE", "false", "0"),
]


@pytest.mark.parametrize("value", SPELLINGS)
@pytest.mark.parametrize(("field", "kind"), [("top_k", int), ("temperature", float), ("ignore_eos", bool)])
async def test_scalars_are_taken_as_pydantic_takes_them(world, check_error, field, kind, value):
    world.engine.answer("x")
    try:
        expected = pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError:
        check_error(await world.chat(**{field: value}), 400, param=field)
        return
    response = await world.chat(**{field: value})
    if field == "temperature" and expected < 0:
        check_error(response, 400, param=field)
        return
    assert response.status_code == 200, response.text
    assert getattr(world.engine.requests[0].sampling_params, field) == expected


@pytest.mark.parametrize(("options", "status"), [({}, 200), ({"include_usage": False}, 400), ({"zzz": 1}, 200)])
async def test_options_of_a_stream_that_ask_for_nothing_need_none(world, options, status):
    """vLLM's rule, but for the last: what it holds besides is ignored like any unknown field."""
    world.engine.answer("x")
    assert (await world.chat(stream_options=options)).status_code == status


@pytest.mark.parametrize(("stream", "is_streamed"), [(0, False), (1, True), ("false", False), (1.0, True)])
async def test_stream_is_a_boolean_in_any_spelling(world, stream, is_streamed):
    world.engine.answer("x")
    response = await world.chat(stream=stream)
    assert response.headers["content-type"].startswith("text/event-stream" if is_streamed else "application/json")


async def test_spellings_inside_an_object_and_a_list(world, parse_events):
    world.engine.answer("x")
    options = {"stream": "yes", "stream_options": {"include_usage": 1}, "stop_token_ids": ["3", 4.0]}
    assert "usage" in parse_events((await world.complete(**options)).text)[-1]
    assert world.engine.requests[0].sampling_params.stop_token_ids == (3, 4)


async def test_a_text_that_looks_like_a_number_or_null_stays_a_text(world):
    world.engine.answer("x")
    for text in ("5", "null", "true"):
        assert (await world.complete(prompt=text, stop=[text])).status_code == 200
        assert (await world.complete(prompt=[text], stop=text)).status_code == 200
        for request in world.engine.requests[-2:]:
            assert request.prompt_token_ids == world.tokenizer.encode(text)
            assert request.sampling_params.stop == (text,)


async def test_fields_of_other_servers_are_ignored_aloud(world, caplog):
    world.engine.answer("x")
    extras = {"top_a": 0.1, "options": {"num_ctx": 9}, "cache_prompt": True, "my_own": 1, "usage": None}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            response = await world.chat(**extras)
            assert response.status_code == 200, response.text
            assert response.headers[HEADER] == "top_a, options, cache_prompt, my_own"
    (record,) = (record for record in caplog.records if "Ignored fields" in record.message)
    assert "path=/v1/chat/completions fields=cache_prompt,my_own,options,top_a" in record.message
    metrics = (await world.http.get("/metrics")).text
    labels = 'model_name="tiny",engine="0"'
    for field in ("top_a", "options", "cache_prompt", "other"):
        assert f'quire:request_ignored_fields_total{{{labels},field="{field}"}} 2.0' in metrics
    assert "my_own" not in metrics


async def test_fields_inside_the_body_are_named_by_their_path(world):
    world.engine.answer("x")
    text = {"type": "text", "text": "hi", "cache_control": {}}
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    response = await world.chat(
        messages=[
            {"role": "user", "content": [text, text]},
            {"role": "assistant", "content": "", "annotations": [], "audio": None, "tool_calls": [call]},
        ],
        stream=True,
        stream_options={"include_usage": True, "chunk_size": 3},
        response_format={"type": "text", "strict": True},
    )
    assert response.status_code == 200, response.text
    assert response.headers[HEADER].split(", ") == [
        "messages[].content[].cache_control",
        "messages[].annotations",
        "messages[].tool_calls[].index",
        "stream_options.chunk_size",
        "response_format.strict",
    ]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
async def test_other_endpoints_ignore_alike(world, path, body):
    response = await world.http.post(path, json={**body, "with_pieces": True})
    assert (response.status_code, response.headers[HEADER]) == (200, "with_pieces")


async def test_a_refusal_names_what_was_ignored_too(world, check_error):
    response = await world.chat(max_token=5, temperature=-1)
    check_error(response, 400, param="temperature")
    assert response.headers[HEADER] == "max_token"


async def test_nothing_ignored_leaves_no_header(world):
    world.engine.answer("x")
    assert HEADER not in (await world.chat(user="me", top_a=None)).headers


async def test_what_a_client_chooses_is_bounded(world, caplog):
    world.engine.answer("x")
    names = ["x" * 500, "a,b", "a\r\nSet-Cookie: b", "é", 'say "no"', *(f"field_{index}" for index in range(500))]
    with caplog.at_level(logging.WARNING):
        response = await world.complete(**dict.fromkeys(names, 1))
        assert response.status_code == 200
        shown = response.headers[HEADER].split(", ")
        assert len(shown) == MAX_NAMES
        assert shown[:5] == ["x" * (MAX_NAME_LENGTH - 3) + "...", "a?b", "a??Set-Cookie: b", "?", "say ?no?"]
        for start in range(0, 500, MAX_NAMES):
            await world.complete(**dict.fromkeys(names[5 + start : 5 + start + MAX_NAMES], 1))
    logged = {name for record in caplog.records for name in record.message.partition("fields=")[2].split(",")}
    assert len(logged) == MAX_LOGGED_NAMES
    metrics = (await world.http.get("/metrics")).text
    assert metrics.count("quire:request_ignored_fields_total{") == 1


async def test_names_cost_nothing_but_for_those_that_are_shown(world, monkeypatch):
    """15 MB of a name, or 100,000 names that all print as question marks, held the event loop for seconds."""
    world.engine.answer("x")
    printed = []
    printable = lenient._printable
    monkeypatch.setattr(lenient, "_printable", lambda name: printed.append(name) or printable(name))
    alike = [chr(0x4E00 + index) * 40 for index in range(1000)]
    response = await world.complete(**dict.fromkeys(["x" * 1_000_000, *alike], 1))
    assert response.headers[HEADER] == f"{'x' * (MAX_NAME_LENGTH - 3)}..., {'?' * 40}"
    assert len(printed) == MAX_NAMES
    assert max(map(len, printed)) == MAX_NAME_LENGTH + 1


async def test_strict_fields_refuse_what_is_not_known_by_name(build_world, check_error):
    world = build_world(strict_fields=True)
    world.load()
    world.engine.answer("x")
    assert "max_token" in check_error(await world.chat(max_token=5), 400, param="max_token")
    check_error(await world.http.post("/tokenize", json={"prompt": "x", "y": 1}), 400, param="y")
    messages = [{"role": "user", "content": "hi", "annotations": []}]
    assert (await world.chat(messages=messages)).status_code == 200


async def test_browsers_may_read_the_header(world):
    response = await world.http.get("/version", headers={"origin": "https://ui.example"})
    assert "X-Quire-Ignored-Fields" in response.headers["access-control-expose-headers"]


@pytest.mark.parametrize("role", ["wizard", "ipython", "latest_reminder"])
async def test_the_models_template_decides_which_roles_there_are(world, role):
    world.engine.answer("x")
    assert (await world.chat(messages=[{"role": role, "content": "x"}])).status_code == 200
    prompt = world.tokenizer.decode(world.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith(f"<|im_start|>{role}\nx<|im_end|>")


@pytest.mark.parametrize(
    ("fields", "has_tools"),
    [
        ({"tools": []}, False),
        ({"tools": [], "tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, False),
        ({"tools": [TOOL], "tool_choice": "none"}, True),
        ({"functions": [{"name": "f"}], "function_call": "none"}, False),
    ],
)
async def test_tools_that_may_not_be_called_are_shown_to_the_template_alone(chat_template_world, fields, has_tools):
    """vLLM gives them to the template unless started with --exclude-tools-when-tool-choice-none."""
    world = chat_template_world("{{ 'no tools' if tools is none else tools | map(attribute='function.name') | join }}")
    world.engine.answer("x")
    response = await world.chat(**fields)
    assert response.status_code == 200, response.text
    prompt = world.tokenizer.decode(world.engine.requests[0].prompt_token_ids)
    assert prompt == ("get_weather" if has_tools else "no tools")
    tokenized = await world.http.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "hi"}], "tools": fields.get("tools")}
    )
    assert tokenized.json()["tokens"] == world.engine.requests[0].prompt_token_ids


@pytest.mark.parametrize("fields", [{"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}])
async def test_tools_that_may_be_called_are_refused(world, check_error, fields):
    check_error(await world.chat(**fields), 400, param="tools")


@pytest.mark.parametrize("tool", [{}, {"function": {}}, {"function": {"name": 1}}, {"function": "f"}])
async def test_a_tool_without_a_name_is_refused(world, check_error, tool):
    check_error(await world.chat(tools=[tool], tool_choice="none"), 400, param="tools[0].function.name")
