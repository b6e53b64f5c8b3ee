"""Where a model's parameters come from: the checkpoint's modules, by what they are to us. Pure data.

`{layer}` in a name is the layer's number. How the modules of a linear layer make it up is in `planning/layout.py`; what
names a kind of attention or feed-forward has is in its own module in `kinds/`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quire_server.models.planning.layout import LinearWeights
from quire_server.models.planning.spec import DecoderSpec

Aliases = tuple[tuple[str, str], ...]
"""(prefix, other prefix): a tensor that is not found is looked for under the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. Norms are modules too (`.weight`, `.bias`); weightless ones need no name."""

    attention: object
    """Of the kind's own type (`AttentionWeights`)."""
    feed_forward: object
    """Of the kind's own type (`MlpWeights`)."""
    attention_norm: str | None = None
    attention_output_norm: str | None = None
    feed_forward_norm: str | None = None
    feed_forward_output_norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """A whole model."""

    token_embedding: str
    position_embedding: str | None = None
    project_in: LinearWeights | None = None
    layers: tuple[LayerWeights, ...]
    """[num_layers], or one for all of them."""
    final_norm: str | None
    project_out: LinearWeights | None = None
    lm_head: LinearWeights
    aliases: Aliases = ()

    def layer(self, index: int) -> LayerWeights:
        return self.layers[0 if len(self.layers) == 1 else index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture's configs and checkpoints are read."""

    build_spec: Callable[[Mapping[str, Any]], DecoderSpec]
    build_weights: Callable[[Mapping[str, Any]], WeightMap]
    """From the config too: names and layouts may depend on it (Falcon, BigCode), and layers may differ (DeepSeek)."""


def always(weights: WeightMap) -> Callable[[Mapping[str, Any]], WeightMap]:
    """Return the `build_weights` of a family whose checkpoints all have the same names."""
    return lambda config: weights


def spellings(name: str, aliases: Aliases) -> Iterator[str]:
    """Yield the names that a tensor may have in a checkpoint, the first one first."""
    yield name
    yield from (other + name.removeprefix(prefix) for prefix, other in aliases if name.startswith(prefix))
