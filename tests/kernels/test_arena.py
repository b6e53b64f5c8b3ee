"""The memory that packed weights are carved from."""

import re
from pathlib import Path

import torch

from quire_kernels._cpu.arena import Arena


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), flags=re.MULTILINE)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_carved_tensors_are_aligned_and_never_overlap() -> None:
    arena = Arena(mapping_bytes=1 << 16)
    sizes = [1, 64, 65, 4096, 1 << 15, 1 << 15, 3, 1 << 18, 7, 1 << 16]
    carved = [arena.empty(size) for size in sizes]
    assert [tensor.numel() for tensor in carved] == sizes
    assert all(tensor.data_ptr() % 64 == 0 and tensor.dtype == torch.uint8 for tensor in carved)
    for value, tensor in enumerate(carved):
        tensor.fill_(value)
    assert all(bool((tensor == value).all()) for value, tensor in enumerate(carved))


def test_small_tensors_lie_side_by_side() -> None:
    arena = Arena()
    first, second = arena.empty(100), arena.empty(100)
    assert second.data_ptr() == first.data_ptr() + 128


def test_a_mapping_is_given_back_with_its_last_tensor() -> None:
    arena = Arena(mapping_bytes=1 << 22)
    first, second = arena.empty(1 << 21), arena.empty(1 << 21)
    address = second.data_ptr()
    del first
    second.fill_(1)
    assert is_mapped(address)
    arena.empty(1 << 22)  # the arena lets go of the first mapping
    assert is_mapped(address)
    del second
    assert not is_mapped(address)
