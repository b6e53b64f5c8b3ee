"""Fields that other servers' clients send and that this server ignores: by name, so that a metric can count them.

A field that would make the answer mean something else is not here but among `requests.UNSERVED`, and is refused.
"""

from typing import Final

_VLLM: Final = (
    *("data_parallel_rank", "mm_payload", "return_mm_kwargs", "return_prompt_text", "return_token_offsets"),
    *("return_weight_versions", "routed_experts_prompt_start", "session_id", "stream_interval"),
)
_SGLANG: Final = (
    *("no_stop_trim", "return_hidden_states", "rid", "separate_reasoning", "session_params", "stream_reasoning"),
)
_LLAMA_CPP: Final = (
    *("cache_prompt", "dry_allowed_length", "dry_base", "dry_multiplier", "dry_penalty_last_n", "dynatemp_exponent"),
    *("dry_sequence_breakers", "dynatemp_range", "id_slot", "min_keep", "mirostat", "mirostat_eta", "mirostat_tau"),
    *("n_keep", "n_predict", "n_probs", "parse_tool_calls", "penalize_nl", "post_sampling_probs", "reasoning_budget"),
    *(
        "reasoning_format",
        "repeat_last_n",
        "repeat_penalty",
        "return_progress",
        "samplers",
        "t_max_predict_ms",
        "tfs_z",
    ),
    *("thinking_forced_open", "timings_per_token", "top_n_sigma", "typical_p", "xtc_probability", "xtc_threshold"),
)
_OLLAMA_AND_LM_STUDIO: Final = ("draft_model", "keep_alive", "num_ctx", "num_predict", "options", "think", "ttl")
_OPENROUTER: Final = ("models", "plugins", "provider", "reasoning", "route", "top_a", "transforms", "usage")
_TEXT_GENERATION: Final = (
    *("add_bos_token", "ban_eos_token", "custom_token_bans", "decoder_input_details", "details", "do_sample"),
    *("dynamic_temperature", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "guidance_scale"),
    *("max_new_tokens", "mirostat_mode", "negative_prompt", "no_repeat_ngram_size", "num_beams", "penalty_alpha"),
    *("return_full_text", "smoothing_curve", "smoothing_factor", "temperature_last", "tfs", "token_healing"),
    *("truncation_length", "watermark"),
)
_HOSTED: Final = (
    *("data_sources", "enable_search", "enable_thinking", "incremental_output", "input", "instructions"),
    *("max_output_tokens", "max_token", "prompt_cache_options", "system", "thinking", "thinking_budget"),
)
_IN_MESSAGES: Final = (
    *("messages[].annotations", "messages[].audio", "messages[].cache_control", "messages[].content[].cache_control"),
    *("messages[].id", "messages[].refusal", "messages[].reasoning_details", "messages[].tool_calls[].index"),
)

KNOWN_EXTRAS: Final = frozenset(
    (*_VLLM, *_SGLANG, *_LLAMA_CPP, *_OLLAMA_AND_LM_STUDIO, *_OPENROUTER, *_TEXT_GENERATION, *_HOSTED, *_IN_MESSAGES)
)
