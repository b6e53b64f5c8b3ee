"""Reading a tokenizer from disk: which files there are, and what each says.

A directory holds `tokenizer.json` (everything), or `vocab.json` and `merges.txt` (byte-level BPE), or `tokenizer.model`
(SentencePiece), or a GGUF file; `tokenizer_config.json` names the special tokens. Agrees with `transformers` 5.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.backends import TokenizerParts, add_bos_eos, build_byte_level
from quire_server.tokens.gguf_tokenizer import read_gguf_tokenizer
from quire_server.tokens.sentencepiece_model import read_sentencepiece
from quire_server.weights.stored import read_json

_NAMED_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


def read_tokenizer_parts(path: Path) -> TokenizerParts:
    """Read the tokenizer at a directory or .gguf file.

    Raises:
        CheckpointError: there is none, or it cannot be read; the message names the file.
    """
    gguf = gguf_file(path)
    if gguf is not None:
        return read_gguf_tokenizer(gguf)
    config = _read_tokenizer_config(path)
    parts = _read_vocabulary(path, config)
    backend = parts.backend
    backend.no_truncation()
    backend.no_padding()
    special_tokens = {**parts.special_tokens, **_named_special_tokens(config)}
    _add_tokens(backend, config)
    if not (path / "tokenizer.json").is_file():  # which has its own rule, and it wins
        _set_bos_eos(backend, config, special_tokens)
    return TokenizerParts(
        backend=backend, special_tokens=special_tokens, chat_templates=_read_chat_templates(path, config)
    )


def read_eos_token_ids(path: Path) -> tuple[object, ...]:
    """Return the ends of an answer that a model directory's generation config names (or its config, without one).

    Whatever stands there: whether they are tokens of the model is `model_vocabulary`'s to say.
    """
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            value = read_json(path / name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
    return ()


def gguf_file(path: Path) -> Path | None:
    """Return the .gguf file that is, or is all of, the model at a path; None: it has files of its own kind."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if (path / "config.json").is_file() or (path / "tokenizer.json").is_file():
        return None
    return min(path.glob("*.gguf"), default=None)


def _read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, which older checkpoints rely on."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            config |= {key: value for key, value in read_json(path / name).items() if value is not None}
    return config


def _read_vocabulary(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    if (path / "tokenizer.json").is_file():
        return TokenizerParts(backend=_load_json_backend(path / "tokenizer.json"), special_tokens={})
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return TokenizerParts(backend=_byte_level_backend(path, config), special_tokens={})
    if (path / "tokenizer.model").is_file():
        return read_sentencepiece(path / "tokenizer.model")
    raise CheckpointError(
        f"{path}: has no tokenizer.json (nor vocab.json and merges.txt, nor tokenizer.model).",
        hint="Download the tokenizer's files too, or name their directory with --tokenizer.",
    )


def _load_json_backend(file: Path) -> Backend:
    try:
        backend: Backend = Backend.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error
    return backend


def _byte_level_backend(path: Path, config: Mapping[str, Any]) -> Backend:
    """GPT-2's scheme, which checkpoints of its time (GPT-2, OPT, …) ship as two files."""
    vocabulary = read_json(path / "vocab.json")
    try:
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'merges.txt'}: cannot be read: {error}.") from error
    merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{path / 'merges.txt'}: a line is not a pair of tokens.")
    return build_byte_level(
        vocabulary,
        [(left, right) for left, right in merges],
        add_prefix_space=bool(config.get("add_prefix_space", False)),
    )


def _token_content(value: Any) -> str | None:
    """A token in a configuration is its text, or an object with its text and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: _token_content(config.get(name)) for name in _NAMED_SPECIAL_TOKENS}
    return {name: token for name, token in tokens.items() if token is not None}


def _added_token(value: Any, *, special: bool) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    names = ("single_word", "lstrip", "rstrip", "normalized")
    known = {name: flags[name] for name in names if name in flags} or {"normalized": False}
    return AddedToken(_token_content(value) or "", special=special, **known)


def _add_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    """Add what the configuration names and the vocabulary file lacks, and mark named tokens as special."""
    known = {str(token): token for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder", {})
    for _, value in sorted(declared.items(), key=lambda item: int(item[0])):
        token = _added_token(value, special=bool(value.get("special")))
        if str(token) and str(token) not in known:
            backend.add_tokens([token])
            known[str(token)] = token
    extras = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    extra = [token for tokens in extras for token in (tokens.values() if isinstance(tokens, dict) else tokens or ())]
    values = [config[name] for name in _NAMED_SPECIAL_TOKENS if name in config] + extra
    for value in values:
        content = _token_content(value)
        if content and (content not in known or not known[content].special):
            backend.add_special_tokens([_added_token(value, special=True)])


def _set_bos_eos(backend: Backend, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Follow `add_bos_token` and `add_eos_token`, where given."""
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
        eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
        add_bos_eos(backend, bos, eos)


def _read_chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over the configuration's entry, as in `transformers`."""
    templates: dict[str, str] = {}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates = {entry["name"]: entry["template"] for entry in declared}
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            templates[name] = file.read_text(encoding="utf-8")
    return templates
