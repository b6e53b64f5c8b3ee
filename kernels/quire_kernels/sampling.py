"""From logits to tokens: stateless sampling with given uniforms, and log-probabilities for those who ask.

Knows nothing of seeds or penalties: the caller derives `uniform` from (seed, output position) and edits the logits
beforehand.
"""

import struct

import torch
from torch import Tensor

from quire_kernels._checks import argument_error
from quire_kernels._cpu.native import POINTER, bind
from quire_kernels.device import Backend, backend_for
from quire_kernels.reference import sample_tokens_ref, token_logprobs_ref

_native = bind("quire_sample_tokens", [POINTER])
_pack_arguments = struct.Struct("10q").pack  # SamplingArguments in sampling.cpp


def sample_tokens(
    logits: Tensor,  # [num_rows, vocab_size] float32
    temperature: Tensor,  # [num_rows]
    top_k: Tensor,  # [num_rows] integers; below 1 or from vocab_size: every token
    top_p: Tensor,  # [num_rows]; from 1: every token
    min_p: Tensor,  # [num_rows]; 0: every token
    uniform: Tensor,  # [num_rows] in [0, 1)
) -> Tensor:  # [num_rows] int64
    """Draw one token a row from softmax(logits / temperature) after min_p, top_k and top_p, by inverting its CDF.

    Rows with a temperature below 1e-5 take the first index of their maximum. Filters apply in the order min_p (relative
    to the highest probability), top_k, top_p (over the survivors, renormalised); ties go to the lower token id, and the
    CDF runs in the order of token ids. A token of logit -inf is never drawn while there is another.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if logits.dim() != 2 or logits.dtype is not torch.float32 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise argument_error("logits", logits, "float32 [num_rows, vocab_size], contiguous in vocab_size")
    num_rows, vocab_size = logits.shape
    rows = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, tensor in rows.items():
        if tensor.shape != logits.shape[:1] or tensor.device != logits.device:
            raise argument_error(name, tensor, f"[{num_rows}] on {logits.device}")
    if top_k.is_floating_point():
        raise argument_error("top_k", top_k, "integers")
    if backend_for(logits) is not Backend.NATIVE:
        return sample_tokens_ref(logits, temperature, top_k, top_p, min_p, uniform)
    # Kept alive by name until the call returns.
    temperature, top_p, min_p, uniform = (t.double().contiguous() for t in (temperature, top_p, min_p, uniform))
    top_k = top_k.long().contiguous()
    out = torch.empty(num_rows, dtype=torch.int64)
    _native.call(
        _pack_arguments(
            logits.data_ptr(),
            logits.stride(0),
            num_rows,
            vocab_size,
            temperature.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            uniform.data_ptr(),
            out.data_ptr(),
        )
    )
    return out


def token_logprobs(
    logits: Tensor,  # [num_rows, vocab_size] float32
    token_ids: Tensor,  # [num_rows] int64
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprob[R], rank[R] int64, top_logprobs[R, num_top], top_ids[R, num_top] int64) of the raw distribution.

    A rank of 1 is the most likely token; equal logits share the better rank. num_top may be 0.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if logits.dim() != 2 or logits.dtype is not torch.float32:
        raise argument_error("logits", logits, "float32 [num_rows, vocab_size]")
    if token_ids.shape != logits.shape[:1] or token_ids.dtype is not torch.int64 or token_ids.device != logits.device:
        raise argument_error("token_ids", token_ids, f"int64[{logits.shape[0]}] on {logits.device}")
    if not 0 <= num_top <= logits.shape[1]:
        raise argument_error("num_top", num_top, f"in [0, {logits.shape[1]}]")
    return token_logprobs_ref(logits, token_ids, num_top)
