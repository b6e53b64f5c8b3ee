"""One public function per op; a torch reference, and device code behind it.

This is the only import surface: every function checks its arguments (ValueError), and runs on the CPU's native kernels,
or on torch where there are none.
"""

from quire_kernels.activation import activation, gated_activation
from quire_kernels.attention import paged_attention
from quire_kernels.cache import copy_blocks, rope_and_cache, swap_blocks
from quire_kernels.device import Backend, backend_for, backend_summary
from quire_kernels.linear import PackedWeight, gather_rows, linear, pack_weight
from quire_kernels.norm import layer_norm, rms_norm
from quire_kernels.sampling import sample_tokens, token_logprobs

__all__ = [
    "Backend",
    "PackedWeight",
    "activation",
    "backend_for",
    "backend_summary",
    "copy_blocks",
    "gated_activation",
    "gather_rows",
    "layer_norm",
    "linear",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "sample_tokens",
    "swap_blocks",
    "token_logprobs",
]
