"""Fields of OpenAI's and vLLM's APIs that are not offered, with the values under which they mean nothing.

Anything else in them is refused: a client must not believe that it got what it asked for.
"""

from typing import Any

Neutral = dict[str, tuple[Any, ...]]  # Any: JSON values

SAMPLING: Neutral = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "logits_processors": ([],),
    "cache_salt": (),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "priority": (0,),
}
COMPLETION: Neutral = SAMPLING | {
    "suffix": ("",),
    "best_of": (1,),
    "prompt_embeds": (),
}
CHAT: Neutral = SAMPLING | {
    "add_special_tokens": (False,),  # they are the template's
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
}
STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
TOKENIZE: Neutral = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "tools": ([],),
}
MESSAGE: Neutral = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": (),
}
