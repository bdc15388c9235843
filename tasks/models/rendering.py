"""From a user's text to the tokens a model reads, and the prefix its responses share.

Everything goes through the model's own chat template. Text is rendered first and encoded after,
without special tokens of the tokenizer's own: the template has written them, and a second
beginning-of-sequence token would put every prompt outside what the model was trained on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from artifacts.errors import ModelError

# How a response opens when the model reasons first, and the closed, empty block to put instead.
CLOSED_REASONING = {
    "<think>": "<think></think>",
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
    "<thought>": "<thought></thought>",
    "[THINK]": "[THINK][/THINK]",
}


def render(
    tokenizer: Any, user_text: str, system_prompt: str | None = None, response_prefix: str = ""
) -> str:
    """One prompt as text: system prompt, user's turn, generation prompt, response prefix.

    Raises as `render_turns` does.
    """
    return render_turns(tokenizer, [user(user_text)], system_prompt, response_prefix)


def render_turns(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    system_prompt: str | None = None,
    response_prefix: str = "",
) -> str:
    """A conversation as text, up to where the next response begins.

    `messages` are turns as the template takes them, the user's first and last. A template that
    refuses a system role, or drops it without a word, gets the system prompt in front of the user's
    first turn instead.

    Raises:
        ModelError: the tokenizer has no chat template, or the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"the tokenizer of '{getattr(tokenizer, 'name_or_path', '?')}' has no chat template; "
            "use an instruction-tuned model, or put a chat_template.jinja into its folder"
        )
    if not system_prompt:
        return _apply(tokenizer, messages) + response_prefix
    try:
        text = _apply(tokenizer, [{"role": "system", "content": system_prompt}, *messages])
    except ModelError:
        text = ""
    if system_prompt.strip() not in text:
        first = user(f"{system_prompt}\n\n{messages[0]['content']}")
        text = _apply(tokenizer, [first, *messages[1:]])
    return text + response_prefix


def encode(tokenizer: Any, rendered: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, without padding and with no special token added."""
    if not rendered:
        return []
    ids: list[list[int]] = tokenizer(list(rendered), add_special_tokens=False)["input_ids"]
    return ids


def detect_response_prefix(
    rendered: Sequence[str], respond: Callable[[list[str]], list[str]]
) -> str:
    """What every response begins with, so that judging starts where responses differ.

    Character-level common prefix of the responses, trailing spaces stripped. Where it opens a
    reasoning block, the prefix is that block closed and empty, plus what responses share after
    it. Reference: HERETIC 1.4.0.

    Args:
        rendered: prompts of both classes, rendered without a response prefix.
        respond: greedy responses, special tokens kept (a reasoning opener may be one).

    Returns:
        The prefix; "" for fewer than two prompts, or where all responses are the same: what is
        shared would be the whole answer.
    """
    if len(rendered) < 2:
        return ""
    shared = _shared_prefix(respond(list(rendered)))
    for opener, closed in CLOSED_REASONING.items():
        if shared.startswith(opener):
            return closed + _shared_prefix(respond([text + closed for text in rendered]))
    return shared


def _shared_prefix(responses: list[str]) -> str:
    if len(set(responses)) < 2:
        return ""
    return os.path.commonprefix(responses).rstrip(" ")  # noqa: RUF071 - by character, as meant


def user(text: str) -> dict[str, str]:
    """What a user says, as a message."""
    return {"role": "user", "content": text}


def _apply(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"the chat template fails: {error}") from error
    return text
