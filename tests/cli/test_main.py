import subprocess
import sys
from types import ModuleType

import pytest

from quire_cli.__main__ import COMMANDS, main


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_overview_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sevre"])
    assert caught.value.code == 2
    assert "sevre" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["up", "-f", "x", "--port", "70000"],
        ["gateway", "--config", "x", "--port", "70000"],
        ["operator", "--health-port", "70000"],
        ["operator", "--metrics-port", "70000"],
    ],
)
def test_what_is_no_port_is_status_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "70000 is not a port" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("quire ")


def test_a_command_is_given_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire_cli.__main__ import Command

    module = ModuleType("fake_command", "Does it.")
    module.add_arguments = lambda parser: parser.add_argument("--size", type=int)  # type: ignore[attr-defined]
    module.run = lambda arguments: arguments.size  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(COMMANDS, "fake", Command("fake_command", "help"))
    assert main(["fake", "--size", "7"]) == 7


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from quire_cli.__main__ import COMMANDS; import quire_cli.serve;"
        "heavy = {'torch', 'transformers', 'uvicorn', 'starlette', 'tokenizers', 'asyncio', 'huggingface_hub', 'yaml'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
