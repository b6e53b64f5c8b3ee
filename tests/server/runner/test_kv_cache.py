"""The KV cache's memory, and the movement of blocks between pools."""

import errno
import mmap
import resource
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire_contract.memory.dtypes import FitError, dtype_bytes
from quire_contract.memory.kv_cache import KVCacheGroup, KVCacheSpec, KVFormat
from quire_kernels import cache as cache_kernels
from quire_server.engine.step import BlockCopy
from quire_server.runner.kv_cache import KVCacheStorage

BLOCK_SIZE = 8


def group(layers: tuple[int, ...], num_kv_heads: int = 2, dim: int = 4, window: int | None = None) -> KVCacheGroup:
    kind = "full" if window is None else "window"
    return KVCacheGroup(kind=kind, layers=layers, num_kv_heads=num_kv_heads, key_dim=dim, value_dim=dim, window=window)


LATENT = KVCacheGroup(kind="latent", layers=(1,), num_kv_heads=1, key_dim=6, value_dim=0)
MIXED = (group((0, 3)), LATENT, group((2,), num_kv_heads=1, dim=8, window=5))


def allocate(
    num_blocks: int, groups: tuple[KVCacheGroup, ...] = (group((0, 1)),), kv_format: KVFormat | None = None
) -> KVCacheStorage:
    spec = KVCacheSpec(groups=groups, format=kv_format or KVFormat(dtype="float32"))
    return KVCacheStorage(spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=torch.device("cpu"))


def tensors_of(storage: KVCacheStorage) -> list[Tensor]:
    """Everything that layers keep, scales among it."""
    scales = [storage.scales(layer) for layer in range(len(storage.layers))]
    return [tensor for tensor in (*(part for layer in storage.layers for part in layer), *scales) if tensor.numel()]


def fill(storage: KVCacheStorage, seed: int) -> list[Tensor]:
    """Give every byte a random value; return a copy of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors_of(storage):
        item = tensor.dtype.itemsize
        noise = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] * item), generator=generator)
        tensor.copy_(noise.to(torch.uint8).view(tensor.dtype))
    return copies_of(storage)


def copies_of(storage: KVCacheStorage) -> list[Tensor]:
    """[tensors] of [num_blocks, ...] uint8: not even a NaN's bits may change."""
    return [tensor.contiguous().view(torch.uint8).clone() for tensor in tensors_of(storage)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_allocation(dtype: torch.dtype) -> None:
    storage = allocate(5, kv_format=KVFormat(dtype=str(dtype).removeprefix("torch.")))
    caches = storage.layers
    assert len(caches) == 2
    for tensor in (tensor for cache in caches for tensor in cache):
        assert tensor.shape == (5, 8, 2, 4)
        assert tensor.dtype == dtype
        assert tensor[0].is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
    caches[0].key.fill_(1.0)
    assert not caches[0].value.any()
    assert not caches[1].key.any()
    assert storage.num_bytes == caches[0].key.untyped_storage().nbytes() == 4 * caches[0].key.nbytes


def test_layers_lie_in_a_block_as_kernels_are_tuned_for() -> None:
    """One block of all layers is one piece: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    storage = allocate(3)
    plain = torch.empty(3, 2, 2, BLOCK_SIZE, 2, 4)
    base = storage.layers[0].key.data_ptr()
    for layer, cache in enumerate(storage.layers):
        for part, tensor in enumerate(cache):
            expected = plain[:, layer, part]
            assert tensor.stride() == expected.stride()
            assert tensor.data_ptr() - base == expected.data_ptr() - plain.data_ptr()


@pytest.mark.parametrize(
    "kv_format",
    [
        KVFormat(dtype="bfloat16"),
        KVFormat(dtype="fp8_e4m3", scale_bytes_per_token=4),
        KVFormat(dtype="fp8_e5m2", scale_bytes_per_token=1, scale_bytes_per_block=4),
    ],
)
def test_no_byte_has_two_owners(kv_format: KVFormat) -> None:
    """Layers of every kind, with and without scales: what is written to one is found there, whatever the others get."""
    storage = allocate(4, MIXED, kv_format)
    assert [layer.key.shape[2:] for layer in storage.layers] == [(2, 4), (1, 6), (1, 8), (2, 4)]
    assert storage.layers[1].value.shape == (4, BLOCK_SIZE, 1, 0)
    written = fill(storage, 0)
    assert all(torch.equal(a, b) for a, b in zip(written, copies_of(storage), strict=True))
    assert sum(copy.nbytes for copy in written) <= storage.num_bytes < sum(copy.nbytes for copy in written) + 4 * 8
    dtypes = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    assert {part.dtype for layer in storage.layers for part in layer} == {dtypes[kv_format.dtype]}


def test_every_dtype_that_is_counted_can_be_stored() -> None:
    for dtype in ("float32", "float", "bfloat16", "float16", "half", "fp8", "fp8_e4m3", "fp8_e5m2"):
        storage = allocate(2, kv_format=KVFormat(dtype=dtype))
        assert storage.layers[0].key.dtype.itemsize == dtype_bytes(dtype)
    with pytest.raises(FitError, match="'int3' is not known"):
        allocate(2, kv_format=KVFormat(dtype="int3"))


def test_memory_is_committed_as_it_is_written() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    caches = allocate(1 << 20).layers  # 1 GiB
    caches[1].value[1234567 // 2].fill_(1.0)
    assert caches[1].value[1234567 // 2].sum() == 8 * 8
    assert (resident_pages() - before) * resource.getpagesize() < 32 << 20


def test_a_kernel_without_huge_pages_has_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    assert not allocate(3).layers[0].key.any()


KINDS = [
    pytest.param((group((0, 1)),), KVFormat(dtype="float32"), id="uniform"),
    pytest.param(MIXED, KVFormat(dtype="bfloat16"), id="mixed"),
    pytest.param(MIXED, KVFormat(dtype="fp8_e4m3", scale_bytes_per_token=4), id="scales"),
]


@pytest.mark.parametrize(("groups", "kv_format"), KINDS)
def test_block_copies_happen_in_every_layer(groups: tuple[KVCacheGroup, ...], kv_format: KVFormat) -> None:
    storage = allocate(5, groups, kv_format)
    before = fill(storage, 1)
    storage.move(None, block_copies=[BlockCopy(1, 3), BlockCopy(1, 2), BlockCopy(3, 0)], swap_out=(), swap_in=())
    for was, now in zip(before, copies_of(storage), strict=True):
        assert torch.equal(now, was[[1, 1, 1, 1, 4]])


@pytest.mark.parametrize(("groups", "kv_format"), KINDS)
def test_a_block_that_is_swapped_out_can_be_filled_again_in_the_same_step(
    groups: tuple[KVCacheGroup, ...], kv_format: KVFormat
) -> None:
    device, host = allocate(3, groups, kv_format), allocate(2, groups, kv_format)
    on_device, on_host = fill(device, 2), fill(host, 3)
    device.move(host, block_copies=[BlockCopy(2, 0)], swap_out=[BlockCopy(2, 1)], swap_in=[BlockCopy(0, 2)])
    for was, host_was, now, host_now in zip(on_device, on_host, copies_of(device), copies_of(host), strict=True):
        assert torch.equal(host_now, torch.stack([host_was[0], was[2]]))
        assert torch.equal(now, torch.stack([host_was[0], was[1], host_was[0]]))


def test_one_copy_moves_a_block_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    num_copies = count()
    native_copy = cache_kernels.ctypes.memmove

    def counted(*arguments: int) -> int:
        next(num_copies)
        return native_copy(*arguments)

    storage, host = allocate(4, (group(tuple(range(30))),)), allocate(4, (group(tuple(range(30))),))
    monkeypatch.setattr(cache_kernels.ctypes, "memmove", counted)
    with _NoTensorCopies():
        storage.move(host, block_copies=[BlockCopy(1, 3)], swap_out=[BlockCopy(0, 1)], swap_in=[BlockCopy(2, 2)])
    assert next(num_copies) == 3


class _NoTensorCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "copy" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moves", [{"swap_out": [BlockCopy(1, 1)]}, {"swap_in": [BlockCopy(1, 1)]}])
def test_swapping_needs_a_host_pool(moves: dict[str, Sequence[BlockCopy]]) -> None:
    with pytest.raises(ValueError, match="no host pool"):
        allocate(2).move(None, **{"block_copies": (), "swap_out": (), "swap_in": (), **moves})


def test_a_host_pool_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="dst_cache"):
        allocate(2).move(allocate(2, MIXED), block_copies=(), swap_out=[BlockCopy(1, 1)], swap_in=())
