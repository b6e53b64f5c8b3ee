"""What a tokenizer is made of, and the few kinds that are built here from a vocabulary and its merges."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a tokenizer is made of, wherever it was read from."""

    backend: Backend
    special_tokens: Mapping[str, str]
    """By name (`bos_token`, `eos_token`, …), as chat templates read them."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """By name; `default` is the one used unless another fits better."""
    eos_token_ids: tuple[int, ...] = ()
    """Ends of an answer besides `eos_token`."""

    def with_chat_template(self, source: str) -> "TokenizerParts":
        return replace(self, chat_templates={"default": source})


def add_bos_eos(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Make the tokenizer put BOS before and EOS after a text (None: not that one)."""
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    named = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    backend.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=named)


def build_byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    splits: Iterable[str] | None = None,
    add_prefix_space: bool = False,
    ignore_merges: bool = False,
) -> Backend:
    """Build byte-level BPE. `splits` are regular expressions applied in turn; None: GPT-2's."""
    backend = Backend(models.BPE(dict(vocabulary), list(merges), ignore_merges=ignore_merges))
    if splits is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], is_piece: Sequence[bool]
) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies: every way to join two pieces into a third.

    SentencePiece joins the pair whose result has the best score; ties go to the earlier token.
    """
    to_rank = {token: (-score, i) for i, (token, score) in enumerate(zip(tokens, scores, strict=False)) if is_piece[i]}
    merges = []
    for token, rank in to_rank.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in to_rank and right in to_rank:
                merges.append((rank, to_rank[left][1], left, right))
    merges.sort()
    return [(left, right) for _, _, left, right in merges]


def build_byte_fallback(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unknown_token: str | None,
    add_space_prefix: bool,
) -> Backend:
    """Build SentencePiece's BPE: spaces are `▁`, what has no token is spelled in `<0xXX>` bytes."""
    backend = Backend(
        models.BPE(dict(vocabulary), list(merges), unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decoder_steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        decoder_steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoder_steps)
    return backend
