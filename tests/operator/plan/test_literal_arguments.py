"""Nothing of a spec becomes a flag or is expanded on its way to the server.

`expand` is Kubernetes' own (third_party/forked/golang/expansion/expand.go) in Python, held by rows of its own test, and
the server's own parser reads what comes out.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from plan_world import downloading, served

from quire_operator.plan.resources.workload.pod import as_literal
from quire_server.api_process.arguments import parse_command_line

HOME = {"HOME": "/tmp", "KEY": "secret"}
HOSTILE = ["--help", "-tp", "$(HOME)", "$$(HOME)", "$", "$$", "a$(HOME", "$(KEY)b", "--port=1", "name with spaces"]


def expand(text: str, variables: Mapping[str, str]) -> str:
    result, cursor = "", 0
    while cursor < len(text):
        if text[cursor] != "$" or cursor + 1 == len(text):
            result += text[cursor]
            cursor += 1
        elif text[cursor + 1] == "(" and (end := text.find(")", cursor)) >= 0:
            name = text[cursor + 2 : end]
            result += variables.get(name, f"$({name})")
            cursor = end + 1
        else:
            result += "$" if text[cursor + 1] == "$" else text[cursor : cursor + 2]
            cursor += 2
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(VAR_A)-$(VAR_DNE)", "A-$(VAR_DNE)"),
        ("$(VAR_A$(VAR_B))", "$(VAR_A$(VAR_B))"),
        ("foo$(VAR_Awhoops!", "foo$(VAR_Awhoops!"),
        ("f00__(VAR_A)__", "f00__(VAR_A)__"),
        ("$?_boo_$!", "$?_boo_$!"),
        ("$VAR_A", "$VAR_A"),
        ("$VAR_A)", "$VAR_A)"),
        ("${VAR_A}", "${VAR_A}"),
        ("$$$$$$(BIG_MONEY)", "$$$(BIG_MONEY)"),
        ("$$$$$$$(GOOD_ODDS)", "$$$$(GOOD_ODDS)"),
        ("$$$$$$$(VAR_A)", "$$$A"),
        ("$(VAR_B)_______$(A", "B_______$(A"),
        ("$(VAR_A)foobarzab$", "Afoobarzab$"),
        ("--$($($($($--", "--$($($($($--"),
    ],
)
def test_the_judge_is_kubernetes(text: str, expected: str) -> None:
    assert expand(text, {"VAR_A": "A", "VAR_B": "B"}) == expected


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_literal_comes_out_as_it_went_in(text: str) -> None:
    assert expand(as_literal(text), HOME) == text


def container(spec: dict[str, Any], *, is_download: bool = False) -> list[str]:
    """Return the arguments that the container's process gets."""
    if is_download:
        job = downloading(spec).observed.job
        assert job is not None
    template = (job if is_download else served(spec).workload())["spec"]["template"]
    return [expand(argument, HOME) for argument in template["spec"]["containers"][0]["args"]]


def test_served_names_reach_the_server_as_they_are() -> None:
    names = [*HOSTILE, "nvidia/$(HOME)/x"]
    verb, model, *rest = container({"model": {"uri": "hf://a/b", "servedNames": names}})
    assert verb == "serve"
    given = parse_command_line(["/", *rest], environment={})
    assert given.config.engine.model.served_model_names == tuple(names)
    assert model.startswith("/")


@pytest.mark.parametrize("revision", HOSTILE)
def test_a_revision_is_the_downloads_revision_whatever_it_says(revision: str) -> None:
    from quire_cli.download import add_arguments

    verb, *words = container({"model": {"uri": "hf://a/b", "revision": revision}}, is_download=True)
    assert verb == "download"
    assert parsed(add_arguments, words).revision == revision


def test_a_uri_of_a_bucket_is_not_expanded() -> None:
    assert container({"model": {"uri": "s3://bucket/$(KEY)"}}, is_download=True)[1] == "s3://bucket/$(KEY)"


def test_further_arguments_may_refer_to_the_variables_that_stand_beside_them_and_to_no_others() -> None:
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}}]
    extra = ["--response-role", "$(HOME)", "--api-key", "$(KEY)", "--chat-template", "{{ '$$(HOME)' }}"]
    words = container({"engine": {"env": env, "extraArgs": extra}})
    assert words[-5:] == ["$(HOME)", "--api-key", "secret", "--chat-template", "{{ '$$(HOME)' }}"]


def parsed(add_arguments: Any, words: list[str]) -> Any:
    from argparse import ArgumentParser

    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)
