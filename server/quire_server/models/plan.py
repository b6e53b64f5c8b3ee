"""Every tensor that a model needs, with its shape, known before any is read. Pure: spec and weight map in, plan out.

The loader checks the whole plan against the checkpoint first, so that a wrong file fails in milliseconds and not after
minutes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quire_server.models.spec import DecoderSpec, NormSpec
from quire_server.models.weight_map import LayerWeights, LinearWeights, WeightMap


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """Rows that are looked up: an embedding."""

    module: str
    num_rows: int
    row_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NormPlan:
    module: str
    size: int
    spec: NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    weights: LinearWeights
    out_features: tuple[int, ...]
    """Of each module."""
    in_features: int
    has_bias: bool = False
    num_heads: int = 1
    """What a row order per head counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    attention_norm: NormPlan
    qkv: LinearPlan
    query_norm: NormPlan | None
    key_norm: NormPlan | None
    attention_output: LinearPlan
    post_attention_norm: NormPlan | None
    mlp_norm: NormPlan
    mlp_input: LinearPlan
    mlp_output: LinearPlan
    post_mlp_norm: NormPlan | None

    def parts(self) -> Iterator[NormPlan | LinearPlan]:
        for name in self.__slots__:
            part = getattr(self, name)
            if part is not None:
                yield part


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    token_embedding: TablePlan
    position_embedding: TablePlan | None
    project_in: LinearPlan | None
    layers: tuple[LayerPlan, ...]
    final_norm: NormPlan | None
    project_out: LinearPlan | None
    lm_head: LinearPlan | None
    """None: the token embedding is used again."""

    def outer_parts(self) -> Iterator[TablePlan | NormPlan | LinearPlan]:
        """Everything that is not in a layer."""
        for name in self.__slots__:
            part = getattr(self, name)
            if part is not None and name != "layers":
                yield part


def build_plan(spec: DecoderSpec, weights: WeightMap) -> ModelPlan:
    hidden_size, embedding_size = spec.hidden_size, spec.embedding_size
    is_projected, positions = embedding_size != hidden_size, spec.learned_positions
    return ModelPlan(
        token_embedding=TablePlan(module=weights.token_embedding, num_rows=spec.vocab_size, row_size=embedding_size),
        position_embedding=TablePlan(
            module=weights.position_embedding, num_rows=positions.num_positions + positions.offset, row_size=hidden_size
        )
        if positions is not None and weights.position_embedding is not None
        else None,
        project_in=LinearPlan(weights=weights.project_in, out_features=(hidden_size,), in_features=embedding_size)
        if is_projected and weights.project_in is not None
        else None,
        layers=tuple(_build_layer_plan(spec, weights.layer, layer) for layer in range(spec.num_layers)),
        final_norm=_norm(spec, weights.final_norm) if spec.has_final_norm and weights.final_norm is not None else None,
        project_out=LinearPlan(weights=weights.project_out, out_features=(embedding_size,), in_features=hidden_size)
        if is_projected and weights.project_out is not None
        else None,
        lm_head=None
        if spec.tie_word_embeddings
        else LinearPlan(
            weights=weights.lm_head,
            out_features=(spec.vocab_size,),
            in_features=embedding_size,
            has_bias=spec.has_lm_head_bias,
        ),
    )


def _build_layer_plan(spec: DecoderSpec, weights: LayerWeights, layer: int) -> LayerPlan:
    hidden_size, attention, mlp = spec.hidden_size, spec.attention, spec.mlp
    query_size, kv_size = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim

    def norm(module: str | None, size: int = hidden_size) -> NormPlan | None:
        return None if module is None else _norm(spec, module.format(layer=layer), size)

    def linear(part: LinearWeights, out_features: tuple[int, ...], in_features: int, has_bias: bool) -> LinearPlan:
        if len(part.modules) == 1:
            out_features = (sum(out_features),)
        return LinearPlan(
            weights=part.at(layer),
            out_features=out_features,
            in_features=in_features,
            has_bias=has_bias,
            num_heads=attention.num_heads,
        )

    return LayerPlan(
        attention_norm=_norm(spec, weights.attention_norm.format(layer=layer)),
        qkv=linear(weights.qkv, (query_size, kv_size, kv_size), hidden_size, attention.has_qkv_bias),
        query_norm=norm(weights.query_norm, attention.head_dim) if attention.has_qk_norm else None,
        key_norm=norm(weights.key_norm, attention.head_dim) if attention.has_qk_norm else None,
        attention_output=linear(weights.attention_output, (hidden_size,), query_size, attention.has_output_bias),
        post_attention_norm=norm(weights.post_attention_norm),
        mlp_norm=_norm(spec, weights.mlp_norm.format(layer=layer)),
        mlp_input=linear(
            weights.mlp_input, (mlp.intermediate_size,) * (2 if mlp.is_gated else 1), hidden_size, mlp.has_bias
        ),
        mlp_output=linear(weights.mlp_output, (hidden_size,), mlp.intermediate_size, mlp.has_bias),
        post_mlp_norm=norm(weights.post_mlp_norm),
    )


def _norm(spec: DecoderSpec, module: str, size: int | None = None) -> NormPlan:
    return NormPlan(module=module, size=spec.hidden_size if size is None else size, spec=spec.norm)
