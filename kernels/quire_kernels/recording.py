"""Record the native calls of a computation once, and run them again without Python between them.

A decode step makes some hundreds of calls of a few microseconds each; checking arguments and allocating results between
them takes longer than many of them. A `Recording` is to the CPU what a CUDA graph is to a GPU.

Owns the recording, and the `Workspace` that its intermediates live in. Invariants, as of a CUDA graph: a replay repeats
the recorded calls with the same addresses and sizes, and nothing that Python decided in between is decided again.
Inputs are tensors that the caller keeps and fills anew; the result is the same tensor each time, valid until the next
recording or replay in the same workspace. What reads a tensor's values cannot be recorded (`NotRecordableError`).
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quire_kernels._cpu import native

MAX_ARGUMENTS = 12  # kMaxArguments in replay.cpp
CALL_FIELDS = 2 + MAX_ARGUMENTS  # struct Call in replay.cpp
_MIN_SLOT_BYTES = 4096

_replay = native.bind("quire_replay", [native.POINTER, native.INT64], native.INT64)
_aten = torch.ops.aten
_Step = Callable[[], object]


class NotRecordableError(RuntimeError):
    """The computation depends on values in a way that a replay would not see; run it as it is."""


class Workspace:
    """Memory for intermediates, in slots that are used again as soon as nothing refers to their contents.

    Shared by recordings that never run at the same time, so it is as large as the largest of them.
    """

    def __init__(self) -> None:
        self._slots: list[Tensor] = []  # uint8
        self._size_to_free: dict[int, list[Tensor]] = {}

    @property
    def size_bytes(self) -> int:
        """Return the memory held."""
        return sum(slot.numel() for slot in self._slots)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose slot is free again once the tensor and all views of it are gone."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        size = max(_MIN_SLOT_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        free = self._size_to_free.setdefault(size, [])
        if not free:
            free.append(torch.empty(size, dtype=torch.uint8))
            self._slots.append(free[0])
        slot = free.pop()
        lease = slot.numpy()[:num_bytes]  # torch keeps it for as long as the storage lives
        weakref.finalize(lease, free.append, slot).atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    def alias(self, tensor: Tensor) -> Tensor:
        """Return the same view of the same memory without keeping its slot from others; not ours: the tensor itself."""
        for slot in self._slots:
            offset = tensor.data_ptr() - slot.data_ptr()
            if 0 <= offset < slot.numel():
                elements = slot.view(tensor.dtype)
                return elements.as_strided(tensor.shape, tensor.stride(), offset // tensor.dtype.itemsize)
        return tensor


class Recording:
    """A computation as a list of native calls, with torch's operators, where there were any, between them."""

    def __init__(self, computation: Callable[[], Tensor], workspace: Workspace) -> None:
        self.result: Tensor
        """What the computation returned; each replay fills it anew."""
        self._computation = computation  # keeps alive what it refers to: weights and inputs
        self._workspace = workspace
        self._steps: list[_Step] = []
        self._calls: list[list[int]] = []  # since the last operator
        self._kept: list[object] = []  # what recorded addresses point to, beside the workspace

    def replay(self) -> Tensor:
        """Run all of it again; returns `result`.

        Raises:
            RuntimeError: a kernel refused its arguments, which were right when they were recorded.
        """
        for step in self._steps:
            step()
        return self.result

    def _add_call(self, function: Callable[..., Any], arguments: Sequence[Any], *, returns_status: bool) -> None:
        if len(arguments) > MAX_ARGUMENTS:
            raise NotRecordableError(f"a kernel with {len(arguments)} arguments")
        address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]  # a foreign function
        fields = [address or 0, returns_status, *(self._to_integer(argument) for argument in arguments)]
        self._calls.append(fields + [0] * (CALL_FIELDS - len(fields)))

    def _to_integer(self, argument: Any) -> int:
        if argument is None:
            return 0
        if isinstance(argument, int):  # a bool too
            return int(argument)
        if isinstance(argument, bytes):
            self._kept.append(argument)
            return ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0
        raise NotRecordableError(f"a kernel argument of type {type(argument).__name__}")

    def _add_operator(self, operator: Callable[..., Any], args: Any, kwargs: Any, out: Tensor | None) -> None:
        """Remember an operator of torch's; `out` takes its result, None: it works in place."""
        args, kwargs = tree_map_only(Tensor, self._workspace.alias, (args, kwargs))
        self._end_calls()
        step = partial(operator, *args, **kwargs)
        target = None if out is None else self._workspace.alias(out)
        self._steps.append(step if target is None else lambda: target.copy_(step()))

    def _end_calls(self) -> None:
        if self._calls:
            calls = np.array(self._calls, dtype=np.int64)
            self._kept.append(calls)
            self._steps.append(partial(_replay_calls, calls.ctypes.data, len(calls)))
            self._calls = []


def record(computation: Callable[[], Tensor], workspace: Workspace) -> Recording:
    """Run a computation and remember its native calls; its result is in `Recording.result`.

    Raises:
        NotRecordableError: part of it cannot be repeated, or there are no native kernels. It has not run to its end.
    """
    if native.library() is None:
        raise NotRecordableError("no native kernels")
    recording = Recording(computation, workspace)
    with _recorded_kernels(recording), _OperatorRecorder(recording, workspace):
        result = computation()
    recording._end_calls()
    recording.result = workspace.alias(result)
    return recording


@contextmanager
def _recorded_kernels(recording: Recording) -> Iterator[None]:
    functions = native.functions()
    originals = [function.call for function in functions]

    def wrap(function: native.NativeFunction, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            recording._add_call(original, arguments, returns_status=function.restype is not None)
            return original(*arguments)

        return call

    for function, original in zip(functions, originals, strict=True):
        function.call = wrap(function, original)
    try:
        yield
    finally:
        for function, original in zip(functions, originals, strict=True):
            function.call = original


class _OperatorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base class is untyped
    """Gives intermediates memory that stays, and notices torch operators that compute."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch would import its compiler (a second) to keep away from it."""
        return False

    def __init__(self, recording: Recording, workspace: Workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording
        self._workspace = workspace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format:
            return self._workspace.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func is _aten.new_empty.default:
            return self._workspace.empty(args[1], kwargs.get("dtype") or args[0].dtype)
        if func is _aten.empty_like.default:
            return self._workspace.empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        if func._schema.name.endswith("_"):
            self._recording._add_operator(func, args, kwargs, None)
            return result
        if _is_view(result, (args, kwargs)):
            return result
        if not isinstance(result, Tensor):
            raise NotRecordableError(f"{func} reads values")
        out = self._workspace.empty(result.shape, result.dtype).copy_(result)
        self._recording._add_operator(func, args, kwargs, out)
        return out


def _is_view(result: Any, inputs: Any) -> bool:
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    storages = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    return bool(results) and all(leaf.untyped_storage().data_ptr() in storages for leaf in results)


def _replay_calls(calls: int, num_calls: int) -> None:
    failed = _replay.call(calls, num_calls)
    if failed:
        raise RuntimeError(f"recorded kernel call {failed - 1} of {num_calls} failed")
