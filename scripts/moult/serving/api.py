"""What a request to the small server may ask. What is not known here is refused, so that nothing is ignored in silence."""

from dataclasses import dataclass

# Logits divided by less are more than a float32 can hold.
LEAST_TEMPERATURE = 1e-10

# Fields that are known: those of both paths, with some that change no answer, and by whether it is a chat its own.
SHARED = {
    *("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
    *("stream", "stream_options", "return_token_ids"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id", "priority"),
    "parallel_tool_calls",
}
FIELDS = {
    True: SHARED | {"messages", "add_generation_prompt", "chat_template_kwargs"},
    False: SHARED | {"prompt", "echo", "logprobs"},
}

# Fields that are true or false.
FLAGS = ("stream", "echo", "add_generation_prompt", "return_token_ids")

# Other fields, and the values that ask for nothing else than what is done anyway.
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "documents": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
}


class BadRequest(Exception):
    """What is asked for cannot be answered. `status` is the code of HTTP that says why."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass
class Options:
    """How an answer is sampled. temperature 0 is greedy; seed None is another one each time; stop: texts that end it."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]


def checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list of {role, content}")
    result = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest("messages: each needs a role")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise BadRequest("messages: content must be text")
        result.append({**message, "content": content})
    return result


def number(body: dict, name: str, default, low, high, kinds=(int, float)):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise BadRequest(f"{name}: expected a number from {low} to {high}, got {value!r}")
    return value


def checked_fields(body: dict, chat: bool) -> dict:
    """The fields that a request sets. null sets nothing."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS[chat] and value not in NEUTRAL.get(name, ()):
            raise BadRequest(f"{name:.80}: not supported by this server, which is for trials; vLLM may have it")
    flags = {name: given[name] for name in FLAGS if name in given}
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadRequest("stream_options: expected an object")
    for name, value in {**flags, "stream_options.include_usage": options.get("include_usage") or False}.items():
        if not isinstance(value, bool):
            raise BadRequest(f"{name}: expected true or false")
    if given.get("echo") and given.get("stream"):
        raise BadRequest("echo: not supported with stream")
    return given


def checked_options(body: dict, prompt: int, room: int, chat: bool) -> Options:
    """The options of a request for an answer to a prompt of `prompt` tokens, with `room` tokens in all."""
    if not chat and "logprobs" in body and not (body.get("echo") and body["logprobs"] == 0):
        raise BadRequest("logprobs: this server, which is for trials, has them with echo only, and only logprobs: 0")
    if prompt >= room:
        raise BadRequest(f"the prompt has {prompt} tokens, and this model's maximum context length is {room}")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted = number(body, name, room - prompt if chat else min(16, room - prompt), 0, 2**31, int)
    if prompt + wanted > room:
        raise BadRequest(
            f"{name}: the prompt has {prompt} tokens; with {wanted} more it is over the maximum context length of {room}"
        )
    if wanted == 0 and not body.get("echo"):
        raise BadRequest(f"{name}: must be at least 1")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest("stop: expected a text or a list of texts")
    temperature = number(body, "temperature", 1.0, 0, 2)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise BadRequest(f"temperature: expected 0, or a number from {LEAST_TEMPERATURE} to 2")
    top_p = number(body, "top_p", 1.0, 0, 1)
    if top_p == 0:
        raise BadRequest("top_p: must be above 0")
    return Options(
        max_tokens=wanted,
        temperature=float(temperature),  # transformers takes no int
        top_p=top_p,
        seed=number(body, "seed", None, -(2**63), 2**63 - 1, int),
        stop=stop,
    )
