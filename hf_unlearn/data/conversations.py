"""Conversations: the text that a chat template makes of messages, and which parts of it the assistant says.

Templates differ: some write an earlier answer otherwise than the last one (without its reasoning), some write the
prompt otherwise before an answer. So each answer is found in the text of the whole conversation by what changes when
its content does, unless the text up to the answer is simply where the whole text begins.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_unlearn.data.cells import checked_text
from hf_unlearn.data.formats import ASSISTANT, Row
from hf_unlearn.data.tokens import Span, shared_length
from hf_unlearn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def conversation_text(
    messages: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    context: int = 0,
    options: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the parts of it that the assistant says.

    Args:
        messages: The messages, each with a role and a content.
        tokenizer: A tokenizer with a chat template.
        where: The row, for errors.
        context: Number of first messages whose answers are given, not predicted.
        options: What the template reads besides the messages, such as `tools`.

    Raises:
        DataError: The tokenizer has no chat template or the template rejects the conversation; a message without role
            or content; no answer of the assistant.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the rows are messages, but the tokenizer has no chat template; use prompt + completion rows")
    _check_messages(messages, where)
    answers = [i for i in range(context, len(messages)) if messages[i]["role"] == ASSISTANT]
    if not answers:
        roles = ", ".join(repr(message["role"]) for message in messages[context:])
        raise DataError(
            f"{where} has no answer to predict: no message has the role {ASSISTANT!r} (its roles: {roles}); add the "
            "answer, or leave the row out"
        )
    render = partial(_render, tokenizer, where, options or {})
    text = render(messages)
    return text, [_answer_span(messages, answer, text, render, where) for answer in answers]


def _check_messages(messages: object, where: str) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not len(messages):
        raise DataError(
            f"{where} has no list of messages, but {messages!r:.60}; give messages such as "
            "[{'role': 'user', 'content': ...}, {'role': 'assistant', 'content': ...}]"
        )
    for number, message in enumerate(messages):
        place = f"message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} has no role in {place}: {message!r:.60}; give each message a role and a content")
        content = message.get("content")
        if isinstance(content, list) and content:  # parts of text, images, ...
            for part in content:
                if isinstance(part, Mapping) and part.get("type", "text") == "text":
                    checked_text(part.get("text"), f"the content of {place}", where)
        elif not (message.get("tool_calls") and content in (None, "")):
            text = checked_text(content, f"the content of {place}", where)
            if message["role"] == ASSISTANT and not text.strip():
                raise DataError(f"{where} has an empty answer in {place}; fill it in or leave the row out")


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    options: Mapping[str, Any],
    messages: Sequence[Row],
    prompt: bool = False,
) -> str:
    more = {**options, "add_generation_prompt": True} if prompt else options
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
    except Exception as error:  # a template may raise an error of any type
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{where}: the tokenizer's chat template rejects the conversation ({type(error).__name__}: {reason}); "
            "change the messages (roles, order, contents as texts) or the template"
        ) from error


def _answer_span(messages: Sequence[Row], answer: int, text: str, render: Callable[..., str], where: str) -> Span:
    """Return where the text of the conversation has an answer, with what the template writes around its content."""
    before, until = messages[:answer], messages[: answer + 1]
    prompt = render(before, prompt=True) if before else ""
    shown = render(until)
    changed = render([*before, _with_other_content(messages[answer])])
    content = _differing(shown, changed)
    start = len(prompt) if shown.startswith(prompt) else content[0]
    if content[0] == content[1] and not messages[answer].get("tool_calls"):
        raise DataError(f"{where}: the tokenizer's chat template leaves out message {answer}, an answer; change it")
    if text.startswith(shown):
        return start, len(shown)
    other = _with_other_content(messages[answer])
    first, behind = _differing(text, render([*before, other, *messages[answer + 1 :]]))
    if first == behind:
        raise DataError(
            f"{where}: the tokenizer's chat template does not write message {answer}, an answer, where others follow "
            "it; end the conversation there"
        )
    lead, tail = shown[start : content[0]], shown[content[1] :]
    first -= len(lead) if text[:first].endswith(lead) else 0
    return first, behind + shared_length(tail, text[behind:])


def _with_other_content(message: Row) -> dict[str, Any]:
    """Return a message whose text begins and ends with other characters."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        other = _other_text("".join(text for text in texts if isinstance(text, str)))
        parts = [{**part, "text": other} if part.get("type", "text") == "text" else part for part in content]
        return {**message, "content": parts}
    return {**message, "content": _other_text(content or "")}


def _other_text(text: str) -> str:
    stripped = text.strip()
    return ("z" if stripped[:1] in ("q", "Q") else "q") + ("z" if stripped[-1:] in ("q", "Q") else "q")


def _differing(left: str, right: str) -> Span:
    """Return the part of `left` in which it differs from `right`."""
    start = shared_length(left, right)
    most = min(len(left), len(right)) - start
    same = shared_length(left[::-1], right[::-1])
    return start, len(left) - min(same, most)
