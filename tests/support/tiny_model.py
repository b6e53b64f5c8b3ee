"""A checkpoint of two layers with random weights, for every test of a whole server."""

import json
from pathlib import Path

import tokenizers

TINY_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_MAX_MODEL_LEN = 8192


def save_byte_tokenizer(path: Path, chat_template: str = TINY_CHAT_TEMPLATE) -> int:
    """Save a tokenizer whose tokens are the 256 bytes and three special tokens; return the size of its vocabulary."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return int(backend.get_vocab_size())


def save_tiny_llama(path: Path) -> Path:
    """Save a Llama into an existing folder, as `transformers` does; return the folder."""
    import torch
    import transformers

    vocab_size = save_byte_tokenizer(path)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=vocab_size - 3,
        dtype="float32",
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab_size - 3}))
    return path
