import heapq
import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quire_server.shared.errors import CheckpointError
from quire_server.tokens.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_gguf(path: Path, tokens: list[str], types: list[int], kind: str, **metadata: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def byte_level_vocabulary(directory: Path) -> tuple[list[str], list[str], Any]:
    from transformers import PreTrainedTokenizerFast

    state = json.loads((directory / "tokenizer.json").read_text())
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    tokens = [reference.convert_ids_to_tokens(token_id) for token_id in range(len(reference))]
    return tokens, [" ".join(pair) for pair in state["model"]["merges"]], reference


def write_byte_level(path: Path, directory: Path, pre: str, **metadata: Any) -> Any:
    tokens, merges, reference = byte_level_vocabulary(directory)
    types = [CONTROL if i < 4 else USER_DEFINED if token == "<tool>" else NORMAL for i, token in enumerate(tokens)]
    options = {"add_token_merges": merges, "add_tokenizer_pre": pre, "add_bos_token_id": 0, "add_eos_token_id": 3}
    write_gguf(path, tokens, types, "gpt2", **{**options, **metadata})
    return reference


def test_byte_level_ids_are_those_of_the_json_file(
    byte_level_dir: Path, tmp_path: Path, nasty_texts: list[str]
) -> None:
    reference = write_byte_level(tmp_path / "m.gguf", byte_level_dir, "gpt-2", add_add_bos_token=True)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    for text in nasty_texts:
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
            reference.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.eos_token_ids == (3,)


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.mark.parametrize(
    ("pre", "splits", "ignore_merges"),
    [
        ("llama-bpe", [LLAMA3_SPLIT], True),
        ("qwen2", [QWEN2_SPLIT], False),
        ("smollm", [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"], False),
    ],
)
def test_pre_tokenizers_are_those_of_the_published_models(
    byte_level_dir: Path, tmp_path: Path, nasty_texts: list[str], pre: str, splits: list[str], ignore_merges: bool
) -> None:
    from tokenizers import Regex, models, pre_tokenizers

    reference = write_byte_level(tmp_path / "m.gguf", byte_level_dir, pre, add_add_bos_token=False).backend_tokenizer
    state = json.loads((byte_level_dir / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    reference.model = models.BPE(state["vocab"], merges, ignore_merges=ignore_merges)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    for text in nasty_texts:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(("pre", "has_bos"), [("llama-bpe", True), ("qwen2", False)])
def test_bos_without_a_word_in_the_file(byte_level_dir: Path, tmp_path: Path, pre: str, has_bos: bool) -> None:
    write_byte_level(tmp_path / "m.gguf", byte_level_dir, pre)
    assert (load_tokenizer(tmp_path / "m.gguf").encode("Hi")[0] == 0) is has_bos


def test_an_unknown_pre_tokenizer_is_refused_by_name(byte_level_dir: Path, tmp_path: Path) -> None:
    write_byte_level(tmp_path / "m.gguf", byte_level_dir, "never-heard-of")
    with pytest.raises(CheckpointError, match="never-heard-of"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_directory_with_one_gguf_file_is_that_file(byte_level_dir: Path, tmp_path: Path) -> None:
    write_byte_level(tmp_path / "m.gguf", byte_level_dir, "gpt-2", add_chat_template="{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"


def sentencepiece_vocabulary(directory: Path) -> tuple[list[str], list[float], list[int]]:
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256] + [NORMAL] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return tokens, scores, types


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's SentencePiece tokeniser: join the neighbours whose result scores best, the leftmost first."""
    to_id = {token: token_id for token_id, token in enumerate(tokens)}
    symbols: list[str | None] = list(text.replace(" ", "▁"))
    following = [*range(1, len(symbols)), -1]
    previous = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = (symbols[left] or "") + (symbols[right] or "")
            if joined in to_id:
                heapq.heappush(queue, (-scores[to_id[joined]], left, right, joined))

    for i in range(len(symbols) - 1):
        consider(i, i + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if symbols[left] is None or symbols[right] is None or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, None
        following[left] = following[right]
        if following[right] >= 0:
            previous[following[right]] = left
        consider(previous[left], left)
        consider(left, following[left])
    token_ids: list[int] = []
    for symbol in symbols:
        if symbol is not None:
            token_ids += [to_id[symbol]] if symbol in to_id else [3 + byte for byte in symbol.encode()]
    return token_ids


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_ids_are_those_of_llama_cpp(
    byte_fallback_dir: Path, tmp_path: Path, nasty_texts: list[str], add_space_prefix: bool
) -> None:
    tokens, scores, types = sentencepiece_vocabulary(byte_fallback_dir)
    options = {"add_token_scores": scores, "add_add_space_prefix": add_space_prefix, "add_bos_token_id": 1}
    write_gguf(tmp_path / "m.gguf", tokens, types, "llama", **options, add_eos_token_id=2)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    for text in nasty_texts:
        if any(special in text for special in ("<s>", "</s>", "<unk>", "<0x", "▁")):
            continue  # the reference knows no special tokens
        expected = merge_by_score(" " * add_space_prefix + text if text else "", tokens, scores)
        assert tokenizer.encode(text) == [1, *expected], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_splits_at_special_tokens(byte_fallback_dir: Path, tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece_vocabulary(byte_fallback_dir)
    options = {"add_token_scores": scores, "add_bos_token_id": 1, "add_eos_token_id": 2, "add_add_bos_token": False}
    write_gguf(tmp_path / "m.gguf", tokens, types, "llama", **options)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    hello = merge_by_score(" Hello", tokens, scores)
    assert tokenizer.encode("Hello</s>Hello") == [*hello, 2, *hello]


@pytest.mark.parametrize(
    ("token", "kind", "ends"),
    [("<|eot_id|>", CONTROL, True), ("<|im_end|>", USER_DEFINED, True), ("<|eot_id|>", NORMAL, False)],
)
def test_known_ends_of_turn_end_an_answer(tmp_path: Path, token: str, kind: int, ends: bool) -> None:
    options = {"add_token_merges": [], "add_tokenizer_pre": "gpt-2", "add_eos_token_id": 0}
    write_gguf(tmp_path / "m.gguf", ["<end>", "a", token], [CONTROL, NORMAL, kind], "gpt2", **options)
    assert load_tokenizer(tmp_path / "m.gguf").eos_token_ids == ((0, 2) if ends else (0,))


def test_tokens_that_share_a_text_keep_their_ids(tmp_path: Path) -> None:
    options = {"add_token_merges": [], "add_tokenizer_pre": "gpt-2", "add_eos_token_id": 4}
    write_gguf(tmp_path / "m.gguf", ["a", "<pad>", "<pad>", "", "b"], [NORMAL] * 5, "gpt2", **options)
    tokenizer: Tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.encode("ab") == [0, 4]
    assert tokenizer.vocab_size == 5


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", ["a"], [NORMAL], "rwkv")
    with pytest.raises(CheckpointError, match="'rwkv'; gpt2, llama are supported"):
        load_tokenizer(tmp_path / "m.gguf")
