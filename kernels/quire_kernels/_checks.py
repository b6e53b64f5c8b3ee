"""Errors of the public wrappers: every one is a ValueError that names the argument, what it is, and what it must be.

The wrappers test inline and come here only to raise: a decode step makes some two hundred calls.
"""

from torch import Tensor


def argument_error(name: str, value: object, expected: str) -> ValueError:
    """Build the error for an argument that is not as `expected` says; tensors are described, not printed."""
    return ValueError(f"{name} must be {expected}, got {describe(value)}")


def describe(value: object) -> str:
    """Say in a few words what a value is."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} with strides {list(value.stride())} on {value.device}"
    return repr(value)
