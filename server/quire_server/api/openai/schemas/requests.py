"""What a client may send: every request body, field by field, with OpenAI's and vLLM's names.

Types are checked here; ranges are `SamplingParams`' business. A field that is not listed is ignored aloud (see
`ignored_fields`), because every client of another server sends some that mean nothing here.

`UNSERVED` lists the fields that are known, not served, and would make the answer mean something else: they are refused
by name, but for their neutral values.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

NOT_EMPTY: Final = Meta(min_length=1)
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


Text = Annotated[str, NOT_EMPTY]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries besides text."""

    include_usage: Annotated[bool | None, Meta(description="Send a last chunk with the usage and no choices.")] = None
    continuous_usage_stats: Annotated[bool | None, Meta(description="Send the usage so far with every chunk.")] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Ignored.")] = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is to be written."""

    type: str
    json_schema: Any = None
    schema: Any = None


class _IgnoredFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that OpenAI's clients send and that change nothing here."""

    user: Annotated[Any, Meta(description="Ignored.")] = None
    metadata: Annotated[Any, Meta(description="Ignored.")] = None
    store: Annotated[Any, Meta(description="Ignored.")] = None
    service_tier: Annotated[Any, Meta(description="Ignored.")] = None
    safety_identifier: Annotated[Any, Meta(description="Ignored.")] = None
    prompt_cache_key: Annotated[Any, Meta(description="Ignored.")] = None
    prompt_cache_retention: Annotated[Any, Meta(description="Ignored.")] = None


class _UnservedFields(_IgnoredFields, frozen=True, kw_only=True):
    """Fields of other servers that this one refuses unless they ask for nothing."""

    best_of: Annotated[Int64 | None, Meta(description="Not served; 1 is accepted.")] = None
    use_beam_search: Annotated[bool | None, Meta(description="Not served; false is accepted.")] = None
    length_penalty: Annotated[float | None, Meta(description="Not served; 1.0 is accepted.")] = None
    early_stopping: Annotated[Any, Meta(description="Not served; false is accepted.")] = None
    response_format: Annotated[ResponseFormat | None, Meta(description='Not served; {"type": "text"} is accepted.')] = (
        None
    )
    structured_outputs: Annotated[Any, Meta(description="Not served.")] = None
    guided_json: Annotated[Any, Meta(description="Not served.")] = None
    guided_regex: Annotated[Any, Meta(description="Not served.")] = None
    guided_choice: Annotated[Any, Meta(description="Not served.")] = None
    guided_grammar: Annotated[Any, Meta(description="Not served.")] = None
    guided_decoding_backend: Annotated[Any, Meta(description="Not served.")] = None
    guided_whitespace_pattern: Annotated[Any, Meta(description="Not served.")] = None
    bad_words: Annotated[Any, Meta(description="Not served; [] is accepted.")] = None
    logits_processors: Annotated[Any, Meta(description="Not served.")] = None
    prompt_embeds: Annotated[Any, Meta(description="Not served.")] = None
    kv_transfer_params: Annotated[Any, Meta(description="Not served.")] = None
    vllm_xargs: Annotated[Any, Meta(description="Not served.")] = None
    repetition_detection: Annotated[Any, Meta(description="Not served.")] = None
    thinking_token_budget: Annotated[Any, Meta(description="Not served.")] = None
    mm_processor_kwargs: Annotated[Any, Meta(description="Not served; {} is accepted.")] = None
    media_io_kwargs: Annotated[Any, Meta(description="Not served; {} is accepted.")] = None
    ec_transfer_params: Annotated[Any, Meta(description="Not served.")] = None
    logprob_token_ids: Annotated[Any, Meta(description="Not served; [] is accepted.")] = None
    watermarking: Annotated[bool | None, Meta(description="Not served; false is accepted.")] = None
    grammar: Annotated[Any, Meta(description='Not served; "" is accepted.')] = None
    json_schema: Annotated[Any, Meta(description="Not served.")] = None
    regex: Annotated[Any, Meta(description="Not served.")] = None
    ebnf: Annotated[Any, Meta(description="Not served.")] = None
    structural_tag: Annotated[Any, Meta(description="Not served.")] = None
    input_embeds: Annotated[Any, Meta(description="Not served.")] = None
    lora: Annotated[Any, Meta(description="Not served; [] is accepted.")] = None
    lora_path: Annotated[Any, Meta(description="Not served.")] = None


UNSERVED: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(_UnservedFields.__struct_fields__, ()),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "response_format": (ResponseFormat(type="text"),),
    "bad_words": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "logprob_token_ids": ([],),
    "watermarking": (False,),
    "grammar": ("",),
    "lora": ([],),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
}
for _field in _IgnoredFields.__struct_fields__:
    del UNSERVED[_field]
"""Field → values, besides null, that ask for nothing."""

SWITCHES: Final[dict[str, tuple[str, object]]] = {
    "tools": ("tool_choice", "none"),
    "functions": ("function_call", "none"),
}
"""Field → another field, and the value of that with which nothing is asked of the first."""


class GenerationFields(_UnservedFields, frozen=True, kw_only=True):
    """What both kinds of completion understand. Null means: the server's default."""

    model: Annotated[str | None, Meta(description="A name from /v1/models; null: the only one.")] = None
    n: Annotated[Int64 | None, Meta(description="Answers per prompt.")] = None
    temperature: Annotated[float | None, Meta(description="Below 1e-5 is greedy.")] = None
    top_p: Annotated[float | None, Meta(description="In (0, 1].")] = None
    top_k: Annotated[Int64 | None, Meta(description="0 and -1 mean every token.")] = None
    min_p: Annotated[float | None, Meta(description="In [0, 1], relative to the most likely token.")] = None
    presence_penalty: Annotated[float | None, Meta(description="In [-2, 2].")] = None
    frequency_penalty: Annotated[float | None, Meta(description="In [-2, 2].")] = None
    repetition_penalty: Annotated[float | None, Meta(description="Greater than 0; 1 is none.")] = None
    logit_bias: Annotated[
        Annotated[dict[str, Any], Meta(extra_json_schema={"additionalProperties": {"type": "number"}})] | None,
        Meta(description="Token id to bias, clamped to ±100."),
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[Int64], NOT_EMPTY] | None, Meta(description="Only these tokens may be sampled.")
    ] = None
    seed: Annotated[Int64 | None, Meta(description="Equal seeds give equal answers; answer i uses seed + i.")] = None
    stop: Annotated[Text | list[Text] | None, Meta(description="Texts that end the answer.")] = None
    stop_token_ids: Annotated[list[Int64] | None, Meta(description="Tokens that end the answer.")] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Keep the stop text.")] = None
    ignore_eos: Annotated[bool | None, Meta(description="Go on after end-of-sequence.")] = None
    max_tokens: Annotated[Int64 | None, Meta(description="Most tokens to generate.")] = None
    min_tokens: Annotated[Int64 | None, Meta(description="No end before so many tokens.")] = None
    prompt_logprobs: Annotated[Int64 | None, Meta(description="Alternatives per prompt token; not with stream.")] = None
    skip_special_tokens: Annotated[bool | None, Meta(description="Default true.")] = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="Default true.")] = None
    truncate_prompt_tokens: Annotated[
        Int64 | None, Meta(description="Keep so many prompt tokens; -1: what the context holds.")
    ] = None
    truncation_side: Annotated[Literal["left", "right"] | None, Meta(description="The end cut off.")] = None
    echo: Annotated[bool | None, Meta(description="Put the prompt before the answer.")] = None
    add_special_tokens: Annotated[bool | None, Meta(description="Let the tokenizer add its own.")] = None
    stream: Annotated[bool | None, Meta(description="Answer with server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Only with stream.")] = None
    priority: Annotated[Int64 | None, Meta(description="Lower runs first, under the priority policy.")] = None
    request_id: Annotated[str | None, Meta(description="Makes the id of the answer.")] = None
    cache_salt: Annotated[Text | None, Meta(description="Only equal salts share cached prefixes.")] = None
    return_token_ids: Annotated[bool | None, Meta(description="Add the token ids of prompt and answer.")] = None
    return_tokens_as_token_ids: Annotated[bool | None, Meta(description="Name tokens `token_id:N` in logprobs.")] = None

    @property
    def max_tokens_field(self) -> str:
        """The field that says how many tokens to generate."""
        return "max_tokens"

    @property
    def requested_max_tokens(self) -> int | None:
        value: int | None = getattr(self, self.max_tokens_field)
        return value


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        str | Annotated[list[str | Int64 | Annotated[list[Int64], NOT_EMPTY]], NOT_EMPTY],
        Meta(description="A text, several texts, token ids, or several lists of token ids."),
    ]
    logprobs: Annotated[Int64 | None, Meta(description="Alternatives per token.")] = None
    suffix: Annotated[str | None, Meta(description='Not served; "" is accepted.')] = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message's content; only text parts are served."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """The function that an earlier answer called."""

    name: str
    arguments: Any = "{}"


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of an earlier answer."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(description="Any that the model's chat template knows.")]
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Annotated[
        FunctionCall | None, Meta(description="What tool_calls replaced: shown to the model as the one call of these.")
    ] = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


Tool = dict[str, Any]
"""A function that the model may be told of, as the chat template gets it."""


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], NOT_EMPTY, Meta(description="The conversation so far.")]
    max_completion_tokens: Annotated[Int64 | None, Meta(description="Goes before max_tokens.")] = None
    logprobs: Annotated[bool | None, Meta(description="Return log-probabilities of the answer's tokens.")] = None
    top_logprobs: Annotated[Int64 | None, Meta(description="Alternatives per token; only with logprobs.")] = None
    add_generation_prompt: Annotated[bool | None, Meta(description="Default true.")] = None
    continue_final_message: Annotated[bool | None, Meta(description="Go on with the last message.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Meta(description="Given to the chat template.")] = None
    reasoning_effort: Annotated[str | None, Meta(description="Given to the chat template.")] = None
    tools: Annotated[
        list[Tool] | None, Meta(description='Not served; shown to the model with `tool_choice: "none"`.')
    ] = None
    tool_choice: Annotated[Any, Meta(description='Not served; "none" and "auto" are accepted.')] = None
    functions: Annotated[Any, Meta(description="Not served.")] = None
    function_call: Annotated[Any, Meta(description='Not served; "none" and "auto" are accepted.')] = None
    documents: Annotated[Any, Meta(description="Not served; [] is accepted.")] = None
    modalities: Annotated[Any, Meta(description='Not served; ["text"] is accepted.')] = None
    audio: Annotated[Any, Meta(description="Not served.")] = None
    chat_template: Annotated[Any, Meta(description="Not served: set --chat-template at start.")] = None
    parallel_tool_calls: Annotated[Any, Meta(description="Ignored.")] = None
    prediction: Annotated[Any, Meta(description="Ignored.")] = None
    verbosity: Annotated[Any, Meta(description="Ignored.")] = None
    web_search_options: Annotated[Any, Meta(description="Ignored.")] = None
    moderation: Annotated[Any, Meta(description="Ignored.")] = None
    include_reasoning: Annotated[Any, Meta(description="Ignored.")] = None

    @property
    def max_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], NOT_EMPTY] | None = None
    add_special_tokens: Annotated[bool | None, Meta(description="Default true for prompt, false for messages.")] = None
    add_generation_prompt: Annotated[bool | None, Meta(description="Default true.")] = None
    continue_final_message: Annotated[bool | None, Meta(description="Leave the last message open.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Meta(description="Given to the chat template.")] = None
    tools: Annotated[list[Tool] | None, Meta(description="Given to the chat template.")] = None
    chat_template: Annotated[Any, Meta(description="Not served: set --chat-template at start.")] = None
    return_token_strs: Annotated[bool | None, Meta(description="Add each token as the vocabulary writes it.")] = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[Int64]
    model: str | None = None
