"""From the fields of a request to what is asked of the engine: defaults, refusals and limits. No HTTP."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from quire_contract.flags.table import SchedulingPolicy
from quire_server.api.openai.schemas.requests import SWITCHES, UNSERVED, GenerationFields, StreamOptions
from quire_server.engine.border import validation
from quire_server.frontend.frontend import Frontend
from quire_server.generation.request import GenerationRequest, Prompt
from quire_server.shared.errors import ContextLengthError, InvalidRequestError
from quire_server.shared.field_values import read_texts, read_token_biases
from quire_server.shared.sampling_params import SamplingParams

T = TypeVar("T")

MAX_N = 128
LOGIT_BIAS_LIMIT = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a field that the client left out means: `Frontend.generation_defaults`, or the neutral value."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the loaded model can take."""

    max_model_len: int
    vocab_size: int

    @classmethod
    def of(cls, frontend: Frontend) -> "ModelLimits":
        """Raises ModelLoadingError before the engine is ready."""
        return cls(max_model_len=frontend.max_model_len, vocab_size=frontend.vocab_size)


def refuse_unserved(request: GenerationFields, policy: SchedulingPolicy) -> None:
    """Refuse a request that needs something this server does not do, naming the field.

    Raises:
        InvalidRequestError: a field of `UNSERVED` asks for something, or two fields contradict each other.
    """
    refuse_unserved_fields(request)
    if request.stream_options not in (None, StreamOptions()) and not request.stream:
        raise InvalidRequestError("`stream_options` can only be given with `stream: true`.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError("`prompt_logprobs` is not available with `stream: true`.", param="prompt_logprobs")
    if request.priority and policy != "priority":
        raise InvalidRequestError("`priority` needs a server started with --scheduling-policy priority.", "priority")


def refuse_unserved_fields(request: msgspec.Struct, served: Collection[str] = ()) -> None:
    """Refuse what a field of `UNSERVED` asks for, but for those that this endpoint serves.

    Raises:
        InvalidRequestError: one of them asks for something.
    """
    for name, neutral_values in UNSERVED.items():
        value = None if name in served else getattr(request, name, None)
        if value is None or _is_neutral(value, neutral_values) or _is_switched_off(request, name):
            continue
        raise InvalidRequestError(f"`{name}` is not supported by this server.", param=name)


def _is_switched_off(request: msgspec.Struct, name: str) -> bool:
    switch, off = SWITCHES.get(name, (None, None))
    return switch is not None and getattr(request, switch, None) == off


def _is_neutral(value: object, neutral_values: Collection[object]) -> bool:
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutral_values)


def truncate_prompt(token_ids: list[int], request: GenerationFields, limits: ModelLimits) -> list[int]:
    """Cut a prompt to `truncate_prompt_tokens`: from the left unless told otherwise, as its end matters most."""
    size = request.truncate_prompt_tokens
    if size is None:
        return token_ids
    if size < -1 or size == 0 or size > limits.max_model_len:
        rule = f"`truncate_prompt_tokens` must be -1 or in [1, {limits.max_model_len}], got {size}."
        raise InvalidRequestError(rule, param="truncate_prompt_tokens")
    if size == -1:
        size = limits.max_model_len - (request.requested_max_tokens != 0)  # room for one token, if one is wanted
    if size < 1 or len(token_ids) <= size:
        return token_ids
    return token_ids[:size] if request.truncation_side == "right" else token_ids[-size:]


def check_prompt(token_ids: list[int], limits: ModelLimits, param: str) -> None:
    """Refuse an empty prompt and token ids that the model does not have."""
    if not token_ids:
        raise InvalidRequestError("The prompt is empty.", param=param)
    check_token_ids(token_ids, limits, param)


def check_token_ids(token_ids: Collection[int], limits: ModelLimits, param: str) -> None:
    """Refuse token ids that the model does not have."""
    validation.check_token_ids(param, token_ids, limits.vocab_size)


def build_sampling_params(
    request: GenerationFields,
    defaults: SamplingDefaults,
    limits: ModelLimits,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Fill in defaults and check the values. `seed` is the request's; answer i of several gets seed + i later."""
    _check_choices(request, defaults)
    biases, allowed = read_token_biases("logit_bias", request.logit_bias), request.allowed_token_ids
    return SamplingParams(
        n=_or(request.n, 1),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=min(_or(request.top_k, defaults.top_k), limits.vocab_size),
        min_p=_or(request.min_p, defaults.min_p),
        seed=request.seed,
        stop=read_texts("stop", request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, 0),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=_or(request.skip_special_tokens, True),
        spaces_between_special_tokens=_or(request.spaces_between_special_tokens, True),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        logit_bias=_clamp(biases),
        allowed_token_ids=None if allowed is None else tuple(allowed),
    )


def _clamp(logit_bias: Mapping[int, float]) -> Mapping[int, float]:
    values = logit_bias.values()
    if not logit_bias or (min(values) >= -LOGIT_BIAS_LIMIT and max(values) <= LOGIT_BIAS_LIMIT):
        return logit_bias  # as nearly always; there may be one for each token of the vocabulary
    return {id_: max(-LOGIT_BIAS_LIMIT, min(LOGIT_BIAS_LIMIT, bias)) for id_, bias in logit_bias.items()}


def build_generation_request(
    request: GenerationFields, request_id: str, prompts: Sequence[Prompt]
) -> GenerationRequest:
    """Put prompts together with what the request says of all of them."""
    return GenerationRequest(
        request_id=request_id, prompts=prompts, priority=request.priority or 0, cache_salt=request.cache_salt
    )


def fit_max_tokens(
    request: GenerationFields, limits: ModelLimits, prompt_len: int, *, least: int = 1, default: int | None, param: str
) -> int:
    """Choose how many tokens may be generated after a prompt of `prompt_len` tokens: what was asked for, or the room.

    Editors' clients ask for as much as a model can ever give, and count on being given what is left.

    Args:
        least: what the client may ask for at least.
        default: where it asks for nothing; None: what there is room for.
        param: the field that the prompt came from.

    Raises:
        InvalidRequestError: fewer than `least` are asked for.
        ContextLengthError: the prompt alone leaves no room, or what is asked for would fit after no prompt.
    """
    requested, field = request.requested_max_tokens, request.max_tokens_field
    if requested is not None and requested < least:
        raise InvalidRequestError(f"{field} must be at least 1, got {requested}.", param=field)
    if requested is not None and requested > limits.max_model_len:
        message = f"{_context_of(limits)} you requested {requested} tokens ({field}) in the completion alone."
        raise ContextLengthError(f"{message} Please ask for fewer.", param=field)
    room = limits.max_model_len - prompt_len
    if room < (1 if requested is None else min(requested, 1)):
        message = f"{_context_of(limits)} there are {prompt_len} tokens in the {param}, which leaves no room to answer."
        raise ContextLengthError(f"{message} Please reduce the length of the {param}.", param=param)
    wanted = default if requested is None else requested
    return room if wanted is None else min(room, wanted)


def _context_of(limits: ModelLimits) -> str:
    return f"This model's maximum context length is {limits.max_model_len} tokens. However,"


def _check_choices(request: GenerationFields, defaults: SamplingDefaults) -> None:
    n = _or(request.n, 1)
    if not 1 <= n <= MAX_N:
        raise InvalidRequestError(f"n must be in [1, {MAX_N}], got {n}.", param="n")
    if n > 1 and _or(request.temperature, defaults.temperature) < 1e-5:
        raise InvalidRequestError(f"n must be 1 when sampling is greedy (temperature 0), got {n}.", param="n")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
