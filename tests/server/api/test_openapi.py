"""/openapi.json: it describes every route, and says of bodies and answers what the server enforces and sends."""

import pytest
from jsonschema import Draft202012Validator

from quire_server.api.app import build_routes

pytestmark = pytest.mark.anyio

JSON = "application/json"
EVENTS = "text/event-stream"
MESSAGES = [{"role": "user", "content": "hi"}]


async def test_openapi_describes_every_route(world):
    document = (await world.http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    served = {
        (route.path.replace(":path", ""), method)
        for route in build_routes()
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    assert described == served
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert "200" in operation["responses"]
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["properties"]["temperature"]["description"]


@pytest.fixture
async def document(world):
    return (await world.http.get("/openapi.json")).json()


def validator(document, path, kind=None, *, method="post"):
    """Return what validates the body of a request, or an answer or event of a content type."""
    operation = document["paths"][path][method]
    content = operation["responses"]["200"]["content"][kind] if kind else operation["requestBody"]["content"][JSON]
    schema = {**content["schema"], "components": document["components"]}
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("path", "body", "is_valid"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, True),
        ("/v1/chat/completions", {}, False),
        ("/v1/chat/completions", {"messages": None}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "allowed_token_ids": []}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": ""}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["x", ""]}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": []}, True),
        ("/v1/chat/completions", {"messages": MESSAGES, "cache_salt": ""}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"5": 1}}, True),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"5": "x"}}, False),
        ("/v1/completions", {"prompt": "x"}, True),
        ("/v1/completions", {"prompt": [[1]]}, True),
        ("/v1/completions", {}, False),
        ("/v1/completions", {"prompt": None}, False),
        ("/v1/completions", {"prompt": []}, False),
        ("/v1/completions", {"prompt": [[]]}, False),
        ("/tokenize", {"prompt": "x"}, True),
        ("/tokenize", {"messages": MESSAGES}, True),
        ("/tokenize", {}, False),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, False),
        ("/tokenize", {"messages": []}, False),
        ("/detokenize", {"tokens": [1]}, True),
        ("/detokenize", {}, False),
    ],
)
async def test_bodies_are_valid_where_the_server_takes_them(world, document, path, body, is_valid):
    world.engine.answer("x")
    response = await world.http.post(path, json=body)
    assert (response.status_code == 200) == is_valid, response.text
    assert validator(document, path).is_valid(body) == is_valid


@pytest.mark.parametrize("options", [{}, {"logprobs": 1, "echo": True, "return_token_ids": True, "n": 2}])
async def test_answers_and_events_match_their_description(world, document, parse_events, options):
    world.engine.answer("x", "y")
    for path, ask in (("/v1/chat/completions", world.chat), ("/v1/completions", world.complete)):
        fields = {**options, "logprobs": bool(options)} if ask == world.chat else options
        validator(document, path, JSON).validate((await ask(**fields)).json())
        usage = {"include_usage": True, "continuous_usage_stats": True}
        response = await ask(**fields, stream=True, stream_options=usage)
        for event in parse_events(response.text):
            validator(document, path, EVENTS).validate(event)
    for path in ("/v1/models", "/readyz"):
        validator(document, path, JSON, method="get").validate((await world.http.get(path)).json())


async def test_a_chunk_is_no_whole_answer(world, document, parse_events):
    """Whoever generates a client from the description gets two types, and usage only where it always is."""
    world.engine.answer("x")
    for path, ask in (("/v1/chat/completions", world.chat), ("/v1/completions", world.complete)):
        chunk = parse_events((await ask(stream=True)).text)[0]
        assert not validator(document, path, JSON).is_valid(chunk)
        assert validator(document, path, EVENTS).is_valid({"error": {"message": "x", "type": "y", "code": 500}})


async def test_errors_match_their_description(world, document):
    schema = {"$ref": "#/components/schemas/ErrorResponse", "components": document["components"]}
    Draft202012Validator(schema).validate((await world.chat(model="x")).json())
