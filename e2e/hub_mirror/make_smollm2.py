"""Make SmolLM2 as the Hub has it (safetensors in bfloat16, config, tokenizer) from its GGUF file.

    python make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf DIRECTORY

The values are those of the quantised blocks, so it answers as the GGUF file does. The directory appears in one step.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from quire_server.tokens.gguf_tokenizer import read_gguf_tokenizer
from quire_server.weights.gguf import GgufCheckpoint
from quire_server.weights.tensors import read_tensor


def make_directory(gguf: Path, directory: Path) -> None:
    """Write the model into a directory that does not exist yet."""
    draft = directory.with_name(f".{directory.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        _write(gguf, draft)
        draft.rename(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(gguf: Path, directory: Path) -> None:
    checkpoint = GgufCheckpoint(gguf)
    tensors = {
        name: read_tensor(checkpoint.stored(name), torch.bfloat16).contiguous() for name in checkpoint.tensor_names
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # the library makes it private; mirrors run as other users
    _write_json(directory / "config.json", checkpoint.config)
    _write_json(directory / "generation_config.json", checkpoint.generation_config)
    parts = read_gguf_tokenizer(gguf)
    parts.backend.save(str(directory / "tokenizer.json"))
    tokenizer_config = {**parts.special_tokens, "chat_template": parts.chat_templates["default"]}
    _write_json(directory / "tokenizer_config.json", tokenizer_config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    make_directory(arguments.gguf, arguments.directory)


if __name__ == "__main__":
    main()
