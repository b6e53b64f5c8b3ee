"""Small tokenizers of the kinds that models ship, trained on the spot."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. Don't you think it's 1234567890 times faster?",
    "def main():\n    print('hello, world')\n\n\nif __name__ == '__main__':\n\tmain()\n",
    "Ünïcödé thé naïve café, München, Ελληνικά, русский язык, עברית, العربية, हिन्दी, 日本語, 中文, 한국어",
    "👍🏽 👩‍👩‍👧 🏳️‍🌈 emoji and more emoji 🎉🎉🎉",
    "Hello Hello Hello world world the the the and and of of to to in in",
] * 4

NASTY_TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  three   four    spaces",
    "tabs\t\tand\r\nCRLF\r\n\r\nand\n\n\nnewlines\n",
    " " * 200,
    "\n" * 50,
    "x" * 500,
    "don't DON'T we'll I'M they've",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ²",
    "naïve café e\u0301 u\u0308 \ufb01",
    "👩‍👩‍👧‍👦 family, 👍🏽 skin, 🏳️‍🌈 flag, 🇫🇷",
    "日本語の文章。中文字符，한국어 텍스트",
    "العربية עברית हिन्दी ไทย",
    "zero\u200bwidth \u00a0nbsp \u3000ideographic \ufeffbom",
    "\U0001f600\U00010348\U0010ffff",
    "\x00\x01\x7f\x80",
    "<s></s><|im_start|>user\nhi<|im_end|>",
    "text<|im_end|>glued<s>tokens</s> <|im_start|>",
    "<|im_end |> <|im_end",
    "<0x0A> literal byte token, ▁ literal mark ▁▁",
    "mixed \t \n \r\n  \t ends",
    '{\'json\': [1, 2.5, null], "x": "\\u00e9"}',
    "https://example.com/a?b=c&d=%20#frag",
]


@pytest.fixture(scope="session")
def nasty_texts() -> list[str]:
    return NASTY_TEXTS


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's kind, with ChatML's special tokens and BOS before every text."""
    directory = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's kind: `▁` for spaces, bytes for what the vocabulary lacks."""
    directory = tmp_path_factory.mktemp("byte_fallback")
    save_byte_fallback(directory)
    return directory


def save_byte_fallback(directory: Path) -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    training = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    training.normalizer = normalizer
    # As SentencePiece: no piece goes across words or lines, but pieces of many spaces exist.
    training.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], limit_alphabet=60, show_progress=False
    )
    training.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer = Tokenizer.from_str(training.to_str())
    state = json.loads(training.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True, "normalized": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            "700": {"content": "<|im_start|>", "special": True, "normalized": False},
            "701": {"content": "<|im_end|>", "special": True, "normalized": False},
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
