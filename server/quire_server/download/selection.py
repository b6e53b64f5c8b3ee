"""Which of a source's files make a model, and what to serve of a directory. Pure but for the names in a directory.

A model is a config.json with safetensors, or one GGUF file, whole or in numbered parts. Pickled weights, other
frameworks' weights and pictures are left where they are.
"""

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from quire_contract.model_uri import Scheme
from quire_server.download.errors import ModelInvalidError

TEXT_FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "additional_chat_templates/*")
NOT_NEEDED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "*.onnx.json", ".*")
Address = Callable[[Sequence[str]], str | None]
_PROJECTOR = "mmproj"
"""What llama.cpp's vision projectors are called: no model of their own."""
_PART = re.compile(r"(?P<model>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")


def choose_files(
    model: str, names: Iterable[str], address: Address | None = None, *, only: str | None = None
) -> list[str]:
    """Return the names of the files to fetch.

    Args:
        model: what a person calls the source, for messages.
        names: of all its files.
        address: returns the model URI of a GGUF model, by the names of its parts, or None where a URI cannot name that;
            left out where only a path can name one.
        only: a GGUF file that was chosen, the first of its parts where it has several; None: the source is one model.

    Raises:
        ModelInvalidError: the files are no model, or several, or one has an impossible name.
    """
    chosen = _choose(model, names, address) if only is None else _choose_one(model, list(names), only)
    for name in chosen:
        check_name(name)
    return chosen


def check_name(name: str) -> None:
    """Raise ModelInvalidError unless the name of a file surely leads to a place inside of its model's directory."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ModelInvalidError(
            f"The source lists {name!r}, which is no name for a file of a model: names are relative, without empty"
            " parts, '.' and '..'.",
            hint="Rename the file at the source, or name another source.",
        )


def _choose(model: str, names: Iterable[str], address: Address | None) -> list[str]:
    needed = [name for name in names if not _matches(name, NOT_NEEDED)]
    safetensors = [name for name in needed if name.endswith(".safetensors")]
    if safetensors:
        if "config.json" not in needed:
            raise ModelInvalidError(f"{model} holds safetensors, but no config.json that says what they are.")
        return [name for name in needed if name in safetensors or _matches(name, TEXT_FILES)]
    models = _gguf_models(needed)
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelInvalidError(
            f"{model} holds no safetensors and no GGUF files.", hint="Name a source that holds one or the other."
        )
    listed = ", ".join(parts[0] for parts in models)
    raise ModelInvalidError(f"{model} holds several GGUF models ({listed}).", hint=_how_to_name_one(models, address))


def _choose_one(model: str, names: Sequence[str], only: str) -> list[str]:
    models = _gguf_models(names)
    for parts in models:
        if only == parts[0]:
            return parts
    listed = ", ".join(parts[0] for parts in models) or "none at all"
    raise ModelInvalidError(f"{model} has no GGUF model {only}.", hint=f"Name one that it has: {listed}.")


def _how_to_name_one(models: Sequence[Sequence[str]], address: Address | None) -> str:
    if address is None:
        return "Download the one you want and give its path."
    for parts in models:
        if (uri := address(parts)) is not None:
            return f"Name one of them in spec.model.uri, such as {uri}."
    return "Put the parts of one into a prefix of a bucket, or into a volume, of their own."


def address_on_hub(repo_id: str, parts: Sequence[str]) -> str:
    """Return the model URI of one GGUF model of a repository: that of its first part brings the others along."""
    return f"{Scheme.HF}://{repo_id}/{parts[0]}"


def model_path(directory: Path) -> Path:
    """Return what to serve of a directory: itself, or the only GGUF file in it (the first of its parts).

    A directory of anything else stands for itself, and whoever opens it says what is wrong with it.
    """
    if (directory / "config.json").exists():
        return directory
    names = (file.relative_to(directory) for file in directory.rglob("*.gguf"))
    models = _gguf_models([str(name) for name in names if not name.parts[0].startswith(".")])
    return directory / models[0][0] if len(models) == 1 else directory


def gguf_parts(file: Path) -> list[Path]:
    """Return all parts of the model that a GGUF file is the first part of, as far as they are there."""
    return sorted(file.parent.glob(parts_pattern(file.name))) if is_part(file.name) else [file]


def is_part(name: str) -> bool:
    """Whether a GGUF file is one of the numbered parts of a model."""
    return _PART.fullmatch(name) is not None


def parts_pattern(name: str) -> str:
    """Return the pattern that all parts of a GGUF model match; of a file without parts, its own name."""
    match = _PART.fullmatch(name)
    return glob.escape(name) if match is None else f"{glob.escape(match['model'])}-?????-of-{match['count']}.gguf"


def _gguf_models(names: Sequence[str]) -> list[list[str]]:
    """Return the GGUF models, each with its parts in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and not name.rpartition("/")[2].startswith(_PROJECTOR):
            match = _PART.fullmatch(name)
            models.setdefault(f"{match['model']}-of-{match['count']}" if match else name, []).append(name)
    return list(models.values())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
