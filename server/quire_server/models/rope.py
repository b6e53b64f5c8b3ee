"""Rotary positions: from a config to frequencies. Pure; `modules/rope_table` turns them into what the kernel reads.

Scalings, each as `transformers` computes it: linear (kaiokendev), dynamic NTK (bloc97, emozilla), yarn (Peng et al.,
2023), llama3 (Meta's Llama 3.1), longrope (Ding et al., 2024).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quire_server.models.hf_config import check_size, read_number, require, require_number, require_size
from quire_server.models.planning.spec import RopeSpec
from quire_server.shared.errors import CheckpointError, UnsupportedModelError

Frequencies = tuple[float, ...]


def build_rope_spec(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Build the rotary positions of a config, old style (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Raises UnsupportedModelError for an unknown scaling, CheckpointError for a missing field.
    """
    parameters = _rope_parameters(config)
    kind = parameters["rope_type"]
    if kind not in _SCALINGS:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported ({', '.join(_SCALINGS)} are).")
    with _refusing_what_has_no_result():
        rotary_dim = int(head_dim * parameters["partial_rotary_factor"] + 1e-6)
        return _SCALINGS[kind](_base_frequencies(parameters["rope_theta"], rotary_dim), rotary_dim, parameters)


def scaled_context_len(config: Mapping[str, Any]) -> int:
    """Return how many tokens the model reads. Scalings that stretch `max_position_embeddings` have not yet done so."""
    parameters = _rope_parameters(config)
    max_position: int = parameters["max_position_embeddings"]
    kind, scaled = parameters["rope_type"], max_position
    with _refusing_what_has_no_result():
        if kind in ("linear", "dynamic"):
            scaled = int(max_position * require_number(parameters, "factor"))
        if kind == "yarn" and parameters.get("factor") is not None:
            original: int = parameters["original_max_position_embeddings"]
            scaled = max(max_position, int(original * require_number(parameters, "factor")))
    return check_size("max_position_embeddings, scaled", scaled)


@contextmanager
def _refusing_what_has_no_result() -> Iterator[None]:
    """Numbers that are each possible may still be too large, or divide by nothing, when they meet."""
    try:
        yield
    except ArithmeticError as error:
        raise CheckpointError(
            f"The model's config is not usable: its rope parameters have no result: {error}."
        ) from error


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Join the old style and the new. `type` is an older name of `rope_type`, `su` of longrope, `mrope` of default."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"The model's config is not usable: its rope parameters are {given!r}, not an object.")
    parameters = dict(given)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModelError("rope parameters that differ by layer type are not supported.")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters["rope_type"] = {"su": "longrope", "mrope": "default"}.get(str(kind), str(kind))
    parameters.setdefault("rope_theta", config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0)
    partial = config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    parameters.setdefault("partial_rotary_factor", partial)
    for name in ("rope_theta", "partial_rotary_factor"):
        parameters[name] = require_number(parameters, name)
    if parameters["partial_rotary_factor"] > 1:
        raise CheckpointError("The model's config is not usable: 'partial_rotary_factor' is more than the whole head.")
    parameters["max_position_embeddings"] = require_size(config, "max_position_embeddings")
    original = config.get("original_max_position_embeddings")
    if original is not None or parameters.get("original_max_position_embeddings") is None:
        parameters["original_max_position_embeddings"] = original or parameters["max_position_embeddings"]
    require_size(parameters, "original_max_position_embeddings")
    return parameters


def _base_frequencies(base: float, rotary_dim: int) -> Frequencies:
    return tuple(base ** (-i / rotary_dim) for i in range(0, rotary_dim, 2))


def _default(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    return RopeSpec(rotary_dim=rotary_dim, inv_freq=inv_freq)


def _linear(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    factor = require_number(parameters, "factor")
    return RopeSpec(rotary_dim=rotary_dim, inv_freq=tuple(f / factor for f in inv_freq))


def _dynamic(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    """Unscaled within the trained context; beyond it, scaled once for the longest context, as vLLM does.

    Scaling anew with every token, as the definition has it, would disagree with the keys already cached.
    """
    factor = require_number(parameters, "factor")
    stretch = (factor * factor - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    return RopeSpec(
        rotary_dim=rotary_dim,
        inv_freq=inv_freq,
        long_inv_freq=_base_frequencies(parameters["rope_theta"] * stretch, rotary_dim),
        short_context_len=parameters["max_position_embeddings"],
    )


def _llama3(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    factor = require_number(parameters, "factor")
    context_len: int = parameters["original_max_position_embeddings"]
    low = require_number(parameters, "low_freq_factor")
    high = require_number(parameters, "high_freq_factor")

    def scaled(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < context_len / high:
            return frequency
        if wavelength > context_len / low:
            return frequency / factor
        smooth = (context_len / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return RopeSpec(rotary_dim=rotary_dim, inv_freq=tuple(map(scaled, inv_freq)))


def _yarn(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    base: float = parameters["rope_theta"]
    context_len: int = parameters["original_max_position_embeddings"]
    factor = read_number(parameters, "factor", parameters["max_position_embeddings"] / context_len)

    def dimension_of(num_rotations: float) -> float:
        return rotary_dim * math.log(context_len / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low = dimension_of(read_number(parameters, "beta_fast", 32))
    high = dimension_of(read_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001

    def scale(index: int, frequency: float) -> float:
        interpolated = min(max((index - low) / (high - low), 0.0), 1.0)
        return frequency / factor * interpolated + frequency * (1 - interpolated)

    return RopeSpec(
        rotary_dim=rotary_dim,
        inv_freq=tuple(scale(i, frequency) for i, frequency in enumerate(inv_freq)),
        attention_factor=_yarn_attention_factor(factor, parameters),
    )


def _yarn_attention_factor(factor: float, parameters: Mapping[str, Any]) -> float:
    def mscale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(require_number(parameters, "attention_factor"))
    multiplier, multiplier_all = (
        read_number(parameters, name, 0, can_be_zero=True) for name in ("mscale", "mscale_all_dim")
    )
    return mscale(multiplier) / mscale(multiplier_all) if multiplier and multiplier_all else mscale(1.0)


def _longrope(inv_freq: Frequencies, rotary_dim: int, parameters: Mapping[str, Any]) -> RopeSpec:
    context_len = parameters["original_max_position_embeddings"]
    factor = read_number(parameters, "factor", parameters["max_position_embeddings"] / context_len)
    stretched = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context_len))
    attention_factor = read_number(parameters, "attention_factor", stretched)
    short, long = (_divisors(parameters, name, len(inv_freq)) for name in ("short_factor", "long_factor"))
    return RopeSpec(
        rotary_dim=rotary_dim,
        inv_freq=tuple(frequency / divisor for frequency, divisor in zip(inv_freq, short, strict=True)),
        long_inv_freq=tuple(frequency / divisor for frequency, divisor in zip(inv_freq, long, strict=True)),
        short_context_len=context_len,
        attention_factor=attention_factor,
    )


def _divisors(parameters: Mapping[str, Any], name: str, num_frequencies: int) -> tuple[float, ...]:
    divisors = require(parameters, name)
    if not isinstance(divisors, list | tuple) or len(divisors) != num_frequencies:
        raise CheckpointError(f"The model's config is not usable: {name!r} does not have {num_frequencies} numbers.")
    return tuple(require_number({f"{name}[{index}]": each}, f"{name}[{index}]") for index, each in enumerate(divisors))


_SCALINGS: dict[str, Callable[[Frequencies, int, Mapping[str, Any]], RopeSpec]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
