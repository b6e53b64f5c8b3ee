"""A GGUF file (or its numbered parts) as a checkpoint: Hugging Face's names, order and values over ggml's blocks."""

import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from quire_server.shared.errors import CheckpointError
from quire_server.weights.gguf_config import build_config, build_generation_config
from quire_server.weights.gguf_metadata import check_metadata
from quire_server.weights.gguf_names import GgufArchitecture, find_architecture, hf_name, is_table
from quire_server.weights.gguf_reader import BLOCK_TYPES, GgufFile, GgufTensorInfo, read_gguf, tensor_bytes
from quire_server.weights.stored import StoredTensor


class _Entry(NamedTuple):
    file: GgufFile
    info: GgufTensorInfo
    module: str
    """In GGUF's words, without the layer."""


class GgufCheckpoint:
    """Implements `Checkpoint`. The first part holds the metadata."""

    def __init__(self, path: Path) -> None:
        self.source = path
        self._main = read_gguf(path)
        name = self._main.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: metadata general.architecture is missing.")
        self._architecture: GgufArchitecture = find_architecture(name, path)

    @cached_property
    def config(self) -> dict[str, Any]:
        return build_config(self._parts, self._architecture)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return build_generation_config(self._main)

    @property
    def default_dtype(self) -> str:
        # Blocks have no dtype of their own; bfloat16 holds every model's range.
        return "bfloat16"

    @property
    def unknown_metadata(self) -> tuple[str, ...]:
        return check_metadata(self._main, self.config)

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's own metadata, tokenizer included."""
        return self._main.metadata

    @property
    def tensor_names(self) -> Collection[str]:
        return self._entries.keys()

    def stored(self, name: str) -> StoredTensor:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.source}: tensor {name} is missing.")
        file, info, module = entry
        architecture, config = self._architecture, self.config
        return StoredTensor(
            name=name,
            shape=info.shape,
            num_bytes=tensor_bytes(file, info),
            encoding=BLOCK_TYPES[info.type_id].name,
            file=file.path,
            mapping=file.mapping,
            offset=info.offset,
            row_order=architecture.row_order(module, config["num_attention_heads"], config["num_key_value_heads"]),
            value_offset=architecture.norm_offset if "norm" in module else 0.0,
        )

    @cached_property
    def _entries(self) -> dict[str, _Entry]:
        entries = {}
        for file in self._parts:
            for info in file.tensors.values():
                if not is_table(info.name):
                    name, module = hf_name(self._architecture, info.name)
                    entries[name] = _Entry(file, info, module)
        return entries

    @cached_property
    def _parts(self) -> list[GgufFile]:
        count = self._main.metadata.get("split.count", 1)
        match = re.fullmatch(r"(.*)-00001-of-(\d{5})", self.source.stem)
        if count <= 1:
            return [self._main]
        if match is None:
            raise CheckpointError(
                f"{self.source}: is one of {count} parts; name the first (…-00001-of-{count:05d}.gguf)."
            )
        others = [self.source.with_name(f"{match[1]}-{i:05d}-of-{match[2]}.gguf") for i in range(2, count + 1)]
        return [self._main, *(read_gguf(path) for path in others)]
