"""The parts that a plan consists of: norms, tables, linear layers, and the tensors of the checkpoint that they read.

Pure. A linear layer's tensors are known by its method (`LinearMethod`), which is chosen for each module: a checkpoint
may keep one module in 4 bits and its neighbour unquantised. How a layer of a method runs: `modules/linear.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple, Protocol

from quire_server.models.planning.layout import LinearWeights, ModuleLayout, Segment, module_layouts
from quire_server.shared.errors import UnsupportedModelError
from quire_server.weights.stored import StoredTensor

_FLOAT32_BYTES = 4

StoredLookup = Callable[[str], StoredTensor | None]
"""From a tensor's Hugging Face name to how it is stored; None: there is none, or nothing is known of the files."""


def nothing_stored(name: str) -> StoredTensor | None:
    """Be the lookup of a plan that is made from a config alone."""
    return None


class Pieces(NamedTuple):
    """Loaded bytes that tensor parallelism divides alike."""

    num_pieces: int
    can_replicate: bool
    num_bytes: int
    """Of all pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor of the checkpoint, and what it becomes in memory."""

    name: str
    shape: tuple[int, ...]
    """As stored."""
    encoding: str | None = None
    """As stored (I32, Q4_K, …); None: whatever reads as floating point."""
    fixed_bytes: int | None = None
    """Held once loaded, whatever the model's dtype; None: its elements in that dtype."""
    segments: tuple[Segment, ...] = ()
    """What the ranks of a tensor-parallel group divide among them, each in its units; none: each rank holds all."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def loaded_bytes(self, itemsize: int) -> int:
        """Return what the whole tensor takes once loaded, in a model whose dtype has `itemsize` bytes."""
        return self.num_elements * itemsize if self.fixed_bytes is None else self.fixed_bytes

    def pieces(self, itemsize: int) -> Iterator[Pieces]:
        """Yield the loaded bytes by what divides them; one piece that may be replicated: is never divided."""
        whole = self.loaded_bytes(itemsize)
        if not self.segments:
            yield Pieces(1, True, whole)
        size = sum(segment.size for segment in self.segments)
        for segment in self.segments:
            yield Pieces(segment.num_units, segment.can_replicate, whole * segment.size // size)


class Part(Protocol):
    """Anything that reads tensors."""

    def tensors(self) -> Iterator[TensorPlan]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    kind: Literal["rms", "layer"]
    eps: float
    weight_offset: float = 0.0
    """Added to the stored weight at load (Gemma: 1)."""
    has_weight: bool = True
    """False: nothing is stored (OLMo)."""
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormPlan:
    module: str
    size: int
    spec: NormSpec

    def tensors(self) -> Iterator[TensorPlan]:
        names = ["weight"] * self.spec.has_weight + ["bias"] * self.spec.has_bias
        for name in names:
            yield float32_vector(f"{self.module}.{name}", self.size)


class LinearMethod(Protocol):
    """How linear layers are stored. One frozen dataclass per quantisation scheme; equal methods are loaded together."""

    @property
    def can_look_up(self) -> bool:
        """Whether a table may be stored so: one whose rows are looked up, and which may be the head too."""
        ...

    def tensors(self, plan: "LinearPlan", module: "ModulePlan") -> Iterator[TensorPlan]:
        """Yield the tensors of one module, each with the bytes it holds once loaded."""
        ...


MethodFor = Callable[[str, StoredLookup], LinearMethod]
"""From a module's name, and what is stored, to its method. Asked for linear layers and for tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """One module of the checkpoint."""

    name: str
    layout: ModuleLayout
    method: LinearMethod
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """A linear layer of ours: its modules' outputs, stacked."""

    modules: tuple[ModulePlan, ...]
    inputs: Segment
    shard_dim: Literal[0, 1] | None

    def tensors(self) -> Iterator[TensorPlan]:
        for module in self.modules:
            yield from module.method.tensors(self, module)

    def segments(self, module: ModulePlan) -> tuple[Segment, ...]:
        """Return what divides the weight of a module."""
        if self.shard_dim is None:
            return ()
        return module.layout.segments if self.shard_dim == 0 else (self.inputs,)

    def by_module(self) -> Iterator["LinearPlan"]:
        """Yield each module as a linear layer of its own."""
        for module in self.modules:
            yield replace(self, modules=(module,))


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """Rows that are looked up: an embedding, stored as the linear layer is that has these rows as its outputs."""

    module: ModulePlan
    row_size: int
    is_split: bool
    """By rows."""

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def num_rows(self) -> int:
        return self.module.layout.out_features

    def tensors(self) -> Iterator[TensorPlan]:
        return self.as_linear().tensors()

    def rows(self) -> Segment:
        return self.module.layout.segments[0]

    def as_linear(self) -> LinearPlan:
        """Return the layer that multiplies by the rows: a tied head."""
        features = Segment(name="hidden features", num_units=self.row_size)
        return LinearPlan(modules=(self.module,), inputs=features, shard_dim=0 if self.is_split else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Makes the parts of one layer (None: of what surrounds the layers) from the names in a weight map."""

    hidden_size: int
    method_for: MethodFor
    stored: StoredLookup
    layer: int | None = None
    num_layers: int = 0
    """Of the model."""

    @property
    def knows_files(self) -> bool:
        """Whether `stored` can tell that a tensor is not there."""
        return self.stored is not nothing_stored

    def name(self, name: str) -> str:
        return name if self.layer is None else name.format(layer=self.layer)

    def hidden(self) -> Segment:
        return Segment(name="hidden features", num_units=self.hidden_size)

    def norm(self, module: str | None, spec: NormSpec | None, size: int | None = None) -> NormPlan | None:
        """Return a norm over `size` features (None: the hidden size). Raises ValueError where it has no name."""
        if spec is None:
            return None
        if module is None and (spec.has_weight or spec.has_bias):
            raise ValueError("a norm with parameters has no name in the weight map")
        return NormPlan(module=self.name(module or ""), size=self.hidden_size if size is None else size, spec=spec)

    def linear(
        self, weights: LinearWeights, *, outputs: tuple[Segment, ...], inputs: Segment, has_bias: bool = False
    ) -> LinearPlan:
        """Plan a linear layer. `has_bias` is the config's word, which what is stored overrules."""
        layouts = module_layouts(weights if self.layer is None else weights.at(self.layer), outputs)
        modules = tuple(
            self._module(name, layout, has_bias) for name, layout in zip(weights.modules, layouts, strict=True)
        )
        return LinearPlan(modules=modules, inputs=inputs, shard_dim=weights.shard_dim)

    def _module(self, module: str, layout: ModuleLayout, has_bias: bool) -> ModulePlan:
        name = self.name(module)
        method = self.method_for(name, self.stored)
        return ModulePlan(name=name, layout=layout, method=method, has_bias=self._has_bias(module, has_bias))

    def _has_bias(self, module: str, is_promised: bool) -> bool:
        """Return whether a module has a bias: if one is stored, whatever the config says.

        One that the config promises, and that other layers store, is missing here: planned, so that it will be named.
        """
        if not self.knows_files:
            return is_promised
        if self.stored(f"{self.name(module)}.bias") is not None:
            return True
        others = (replace(self, layer=layer).name(module) for layer in range(self.num_layers))
        return is_promised and any(self.stored(f"{other}.bias") is not None for other in others)

    def table(self, module: str, *, num_rows: int, row_size: int, is_split: bool) -> TablePlan:
        """Raises UnsupportedModelError for a table that is stored in a way whose rows cannot be looked up."""
        name, layout = self.name(module), ModuleLayout(segments=(Segment(name="rows", num_units=num_rows),))
        method = self.method_for(name, self.stored)
        if not method.can_look_up:
            raise UnsupportedModelError(f"{name}: an embedding that is stored as {method} is not supported.")
        return TablePlan(
            module=ModulePlan(name=name, layout=layout, method=method), row_size=row_size, is_split=is_split
        )


def float32_vector(name: str, size: int) -> TensorPlan:
    """Plan a small vector, which is float32 in memory whatever the model's dtype."""
    return TensorPlan(name=name, shape=(size,), fixed_bytes=_FLOAT32_BYTES * size)
