"""How a checkpoint stores its linear layers: the method of each module, chosen by the config and by what is stored.

Pure: a method names tensors, shapes and bytes; `modules/linear.py` makes a layer of them. A new quantisation is a
frozen dataclass here or in a file of its own, and a line in `QUANTIZATIONS` and in `modules/linear.py`'s `LOADERS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_server.models.planning.parts import LinearMethod, LinearPlan, MethodFor, ModulePlan, StoredLookup, TensorPlan
from quire_server.shared.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class UnquantizedMethod:
    """`module.weight` [out, in] and `module.bias` [out], held in the model's dtype.

    A GGUF file's blocks are unquantised too, once they are read.
    """

    can_look_up: ClassVar[bool] = True

    def tensors(self, plan: LinearPlan, module: ModulePlan) -> Iterator[TensorPlan]:
        layout, segments = module.layout, plan.segments(module)
        shape = layout.stored_shape(plan.inputs.size)
        yield TensorPlan(name=f"{module.name}.weight", shape=shape, segments=segments)
        if module.has_bias:
            of_outputs = segments if plan.shard_dim == 0 else ()
            yield TensorPlan(name=f"{module.name}.bias", shape=(layout.out_features,), segments=of_outputs)


def select_method_for(config: Mapping[str, Any]) -> MethodFor:
    """Return how a checkpoint's modules are stored. Raises UnsupportedModelError for an unknown quantisation."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return _unquantized
    name = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
    if not isinstance(name, str) or name not in QUANTIZATIONS:
        raise UnsupportedModelError(
            f"The checkpoint is quantised with {name!r}, which is not supported.",
            hint="Use the unquantised checkpoint, or a GGUF file.",
        )
    return QUANTIZATIONS[name](quantization)


def _unquantized(module: str, stored: StoredLookup) -> LinearMethod:
    return UnquantizedMethod()


QUANTIZATIONS: dict[str, Callable[[Mapping[str, Any]], MethodFor]] = {"gguf": lambda quantization: _unquantized}
"""A config's `quant_method` to what reads its `quantization_config`."""
