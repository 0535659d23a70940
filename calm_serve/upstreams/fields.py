"""Fields of requests: which of them an upstream knows, may go without, or must not miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from calm_serve.upstreams.failures import unsupported
from calm_serve.upstreams.kinds import Api


def names(text: str) -> frozenset[str]:
    """Return the words of `text` as a set."""
    return frozenset(text.split())


# What each API has, by OpenAI's and Anthropic's references. Strict servers refuse other fields.
_COMMON = """model stream stream_options temperature top_p user metadata service_tier store
    prompt_cache_key safety_identifier"""
_SAMPLING = "frequency_penalty presence_penalty logit_bias logprobs n seed stop max_tokens"
_KNOWN: dict[Api, frozenset[str]] = {
    Api.CHAT: names(f"""
        {_COMMON} {_SAMPLING} messages audio function_call functions max_completion_tokens
        modalities parallel_tool_calls prediction prompt_cache_options prompt_cache_retention
        reasoning_effort response_format tool_choice tools top_logprobs verbosity
        web_search_options"""),
    Api.COMPLETIONS: names(
        f"model stream stream_options temperature top_p user {_SAMPLING} prompt best_of echo suffix"
    ),
    Api.RESPONSES: names(f"""
        {_COMMON} input instructions background conversation include max_output_tokens
        max_tool_calls parallel_tool_calls previous_response_id prompt prompt_cache_retention
        reasoning text tool_choice tools top_logprobs truncation"""),
    Api.MESSAGES: names("""
        model messages max_tokens cache_control container context_management inference_geo
        mcp_servers metadata output_config output_format service_tier speed stop_sequences stream
        system temperature thinking tool_choice tools top_k top_p"""),
}
# vLLM's fields without which the answer means something else, or lacks what was asked for.
MEANINGFUL = names("""
    guided_json guided_regex guided_choice guided_grammar structured_outputs logits_processors
    chat_template documents bad_words allowed_token_ids stop_token_ids logprob_token_ids ignore_eos
    min_tokens use_beam_search best_of echo continue_final_message prompt_logprobs prompt_embeds
    return_token_ids return_tokens_as_token_ids return_prompt_text return_token_offsets
    include_stop_str_in_output add_generation_prompt previous_input_messages
    enable_response_messages""")
# Values of these that say no more than the field's absence. 0 is a number of logprobs.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "prompt_logprobs": (None,),
    "best_of": (None, 1),
}
_NONE: tuple[Any, ...] = (None, False, 0, "", [], {})
# What reasoning models of OpenAI take at their defaults only.
_REASONING_DROPPED = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
_REASONING_REFUSED = ("logprobs", "top_logprobs", "logit_bias", "stop")


def known_fields(
    body: Mapping[str, Any], api: Api, slm_id: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that the API's own servers know, and the names of the others.

    Raises UpstreamError if the answer would mean something else without one of those.
    """
    known = _KNOWN[api]
    sent = {name: value for name, value in body.items() if name in known}
    dropped = [name for name in body if name not in known]
    refuse_meaningful(body, dropped, slm_id)
    shape = sent.get("response_format")
    if isinstance(shape, Mapping) and shape.get("type") == "structural_tag":
        raise unsupported(slm_id, "response_format.type")
    return sent, dropped


def refuse_meaningful(
    body: Mapping[str, Any],
    fields: Iterable[str],
    slm_id: str,
    meaningful: frozenset[str] = MEANINGFUL,
) -> None:
    """Raise UpstreamError if one of `fields`, which will not be sent, has a meaning."""
    for name in fields:
        if name in meaningful and body[name] not in _DEFAULTS.get(name, _NONE):
            raise unsupported(slm_id, name)


def for_reasoning(sent: dict[str, Any], slm_id: str) -> list[str]:
    """Change a body for OpenAI's reasoning models in place; return the names of dropped fields.

    Raises UpstreamError for what these models do not do.
    """
    refused = [name for name in _REASONING_REFUSED if name in sent]
    refuse_meaningful(sent, refused, slm_id, frozenset(_REASONING_REFUSED))
    for name in refused:
        del sent[name]
    limit = sent.pop("max_tokens", None)
    if limit is not None:
        sent.setdefault("max_completion_tokens", limit)
    dropped = [name for name in _REASONING_DROPPED if name in sent]
    for name in dropped:
        del sent[name]
    return dropped
