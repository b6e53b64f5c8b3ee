"""How a text is cut before byte-level BPE, by the names that GGUF files use (`tokenizer.ggml.pre`).

Each kind is a list of regular expressions, applied in turn: what one matches, and what lies between, is cut by the
next. The names and their expressions are those of llama.cpp (`llama-vocab.cpp`); where it writes another expression
because its own engine lacks a feature, the published model's is taken.
"""

from typing import NamedTuple

from quire_server.shared.errors import CheckpointError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{tail}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{tail}"
_TEKKEN = _CASED.format(upper=_UPPER, lower=_LOWER, tail="") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O = (
    _CASED.format(upper=_UPPER, lower=_LOWER, tail=_CONTRACTIONS + "?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_SPARK_WORDS = _DEEPSEEK3_WORDS.replace(rf"[\r\n]*|{_TAIL}", r"|[\r\n]|\s+(?!\S)|\s+")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-"
    "ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""What composes to another letter is escaped."""
_DEEPSEEK_LLM = (
    r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+", r"\p{N}+",
)  # fmt: skip
_WORDS_AND_SPACES = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_SHRINKING_SPACES = (
    "|".join(rf"\s{{{size}}}(?!\S)" for size in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
)
_NO_HAN_UPPER, _NO_HAN_LOWER = (kind[:-1] + r"&&[^\p{Han}]]" for kind in (_UPPER, _LOWER))
_KIMI = (
    r"[\p{Han}]+|"
    + _CASED.format(upper=_NO_HAN_UPPER, lower=_NO_HAN_LOWER, tail=_CONTRACTIONS + "?")
    + rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"
)
_LINES = r"[^\n]+|[\n]+"
_ASIAN = r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"


class PreTokenizer(NamedTuple):
    splits: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as a whole is not merged from its characters."""
    adds_bos: bool = False
    """Where the file does not say."""


_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)

_STARTS_OF_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_PLAIN_WORDS = PreTokenizer((_STARTS_OF_WORDS,))
_BAILING = PreTokenizer((_QWEN2.replace(_TAIL, r"\s*[\r\n]|\s+(?!\S)|\s+"),))

_BY_NAME: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "afmoe": PreTokenizer((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _DEEPSEEK3_WORDS)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "exaone-moe": PreTokenizer(
        (rf"{_CONTRACTIONS}|{_WORDS_AND_SPACES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "jais-2": PreTokenizer((_LLAMA3.replace(r"\s+(?!\S)|\s+", _SHRINKING_SPACES),)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _QWEN2.replace(r"\p{N}|", r"\p{N}+|")), ignore_merges=True),
    "qwen35": PreTokenizer((_QWEN35,)),
    "seed-coder": PreTokenizer((_QWEN2.replace(_SYMBOLS, r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _CJK, _SPARK_WORDS, r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "ufakzeka": PreTokenizer((_QWEN2.removeprefix(_CONTRACTIONS + "|"),)),
    "viking": PreTokenizer((_STARTS_OF_WORDS, r"\p{N}")),
    "youtu": PreTokenizer(
        (
            r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
        ),
        ignore_merges=True,
    ),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _PLAIN_WORDS),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0"), _LLAMA_BPE
    ),
    **dict.fromkeys(("glm4", "glm5"), _LLAMA_BPE._replace(adds_bos=False)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(
        (
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0", "mellum",
            "granite-docling",
        ),
        PreTokenizer((_GPT2,)),
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "solar-open", "kormo"),
        PreTokenizer((_QWEN2,)),
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), PreTokenizer((_GPT4O,))),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS))
    ),
}  # fmt: skip

_ENCODER = "it belongs to an embedding model, and this server generates text"
_RAW_UTF8 = "its tokens are raw UTF-8 with ▁ for spaces, not bytes"
NOT_SERVED: dict[str, str] = {
    "chameleon": "it cuts at image tokens, and this server takes text",
    **dict.fromkeys(("gemma4", "sarvam-moe"), _RAW_UTF8),
    **dict.fromkeys(
        (
            "f2llmv2", "granite-embed-multi-311m", "granite-embed-multi-97m", "jina-de", "jina-es", "jina-v1-en",
            "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano", "modern-bert", "roberta-bpe", "whitespace",
        ),
        _ENCODER,
    ),
}  # fmt: skip
"""Names that llama.cpp knows and that are refused here, and why."""


def splits_for(name: str) -> PreTokenizer:
    """Return how a kind cuts text.

    Raises:
        CheckpointError: the name is not known, or not served; says which.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    why = NOT_SERVED.get(name, "it is not known")
    raise CheckpointError(f"The GGUF's pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported: {why}.")
