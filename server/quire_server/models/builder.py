"""Turns a plan into the parts of a decoder, reading each tensor once. Knows no files."""

from typing import NamedTuple

import torch

from quire_server.models.attention import Attention, QkNorm, build_alibi_slopes
from quire_server.models.embedding import Embedding, TableEmbedding, TiedEmbedding
from quire_server.models.layers import DecoderLayer, ParallelLayer, PostNormLayer, PreNormLayer, SandwichLayer
from quire_server.models.linear import Linear, LinearMethod, TensorReader, UnquantizedMethod
from quire_server.models.mlp import GatedMlp, Mlp, PlainMlp
from quire_server.models.norm import LayerNorm, Norm, RmsNorm
from quire_server.models.plan import LayerPlan, LinearPlan, ModelPlan, NormPlan, TablePlan
from quire_server.models.spec import DecoderSpec
from quire_server.models.weight_map import LinearWeights


class OuterParts(NamedTuple):
    """What surrounds the layers."""

    token_embedding: Embedding
    position_embedding: Embedding | None
    project_in: Linear | None
    final_norm: Norm | None
    project_out: Linear | None
    lm_head: Linear


class ModelBuilder:
    """Builds layers in any order, from any thread."""

    def __init__(self, spec: DecoderSpec, plan: ModelPlan, method: LinearMethod, reader: TensorReader) -> None:
        self._spec = spec
        self._plan = plan
        self._method = method
        self._reader = reader
        self._sizes: list[int] = []

    @property
    def num_parameter_bytes(self) -> int:
        """What the parts built so far hold."""
        return sum(self._sizes)

    def build_outer(self) -> OuterParts:
        plan = self._plan
        if plan.lm_head is None:
            lm_head = UnquantizedMethod().load(_tied_head(plan.token_embedding), self._reader)
            self._sizes.append(lm_head.size_bytes)
            token_embedding: Embedding = TiedEmbedding(lm_head.packed)
            head: Linear = lm_head
        else:
            token_embedding, head = self._table(plan.token_embedding), self._linear(plan.lm_head)
        return OuterParts(
            token_embedding=token_embedding,
            position_embedding=None if plan.position_embedding is None else self._table(plan.position_embedding),
            project_in=None if plan.project_in is None else self._linear(plan.project_in),
            final_norm=None if plan.final_norm is None else self._norm(plan.final_norm),
            project_out=None if plan.project_out is None else self._linear(plan.project_out),
            lm_head=head,
        )

    def build_layer(self, index: int) -> DecoderLayer:
        spec, plan = self._spec, self._plan.layers[index]
        attention_norm, mlp_norm = self._norm(plan.attention_norm), self._norm(plan.mlp_norm)
        attention, mlp = self._attention(plan, spec.sliding_windows[index]), self._mlp(plan)
        if spec.norm_placement == "sandwich":
            assert plan.post_attention_norm is not None
            assert plan.post_mlp_norm is not None
            return SandwichLayer(
                attention_norm,
                attention,
                mlp_norm,
                mlp,
                post_attention_norm=self._norm(plan.post_attention_norm),
                post_mlp_norm=self._norm(plan.post_mlp_norm),
            )
        if spec.norm_placement == "post":
            return PostNormLayer(attention_norm, attention, mlp_norm, mlp)
        layer_class = ParallelLayer if spec.is_parallel_residual else PreNormLayer
        return layer_class(attention_norm, attention, mlp_norm, mlp)

    def _attention(self, plan: LayerPlan, sliding_window: int | None) -> Attention:
        spec, qk_norm, slopes = self._spec, None, None
        if plan.query_norm is not None and plan.key_norm is not None:
            qk_norm = QkNorm(self._norm(plan.query_norm), self._norm(plan.key_norm))
        if spec.attention.is_alibi:
            slopes = torch.tensor(build_alibi_slopes(spec.attention.num_heads), device=self._reader.device)
        return Attention(
            spec.attention,
            self._linear(plan.qkv),
            self._linear(plan.attention_output),
            sliding_window=sliding_window,
            is_interleaved=spec.rope is not None and spec.rope.is_interleaved,
            qk_norm=qk_norm,
            alibi_slopes=slopes,
        )

    def _mlp(self, plan: LayerPlan) -> Mlp:
        spec = self._spec.mlp
        mlp_class = GatedMlp if spec.is_gated else PlainMlp
        return mlp_class(self._linear(plan.mlp_input), self._linear(plan.mlp_output), spec.activation)

    def _linear(self, plan: LinearPlan) -> Linear:
        linear = self._method.load(plan, self._reader)
        self._sizes.append(linear.size_bytes)
        return linear

    def _table(self, plan: TablePlan) -> Embedding:
        embedding = TableEmbedding(self._reader.read(f"{plan.module}.weight", self._reader.dtype))
        self._sizes.append(embedding.size_bytes)
        return embedding

    def _norm(self, plan: NormPlan) -> Norm:
        spec, reader = plan.spec, self._reader
        weight = reader.read(f"{plan.module}.weight", torch.float32) + spec.weight_offset
        self._sizes.append(weight.nbytes)
        if spec.kind == "rms":
            return RmsNorm(weight, spec.eps)
        bias = None
        if spec.has_bias:
            bias = reader.read(f"{plan.module}.bias", torch.float32).clone()
            self._sizes.append(bias.nbytes)
        return LayerNorm(weight, bias, spec.eps)


def _tied_head(embedding: TablePlan) -> LinearPlan:
    return LinearPlan(
        weights=LinearWeights(modules=(embedding.module,), shard_dim=0),
        out_features=(embedding.num_rows,),
        in_features=embedding.row_size,
    )
