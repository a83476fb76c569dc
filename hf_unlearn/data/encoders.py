"""One encoder per task: a function from a raw row and its number to model inputs.

An encoder is made once per data set from its columns (`formats`) and an `EncodingContext`, then applied to each row
(`encoding.encode_dataset`). It raises `DataError` with the number of the row and the name of the set.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from hf_unlearn.core.text import ShortRepr, one_line
from hf_unlearn.data.cells import answer_cell, cell, is_empty, listed_cell, require_some_text, text_cell, word_cells
from hf_unlearn.data.conversations import conversation_text
from hf_unlearn.data.formats import (
    ASSISTANT,
    CONTEXTS,
    IMAGES,
    LABELS,
    LANGUAGE_FORMATS,
    LANGUAGE_PAIRS,
    SECRET,
    SEQ2SEQ_PAIRS,
    TAGS,
    TEXTS,
    WORDS,
    Row,
    last_answer,
    with_answer,
)
from hf_unlearn.data.left_out import CutCounter
from hf_unlearn.data.pictures import picture
from hf_unlearn.data.secrets import secret_spans, secrets_of
from hf_unlearn.data.tokens import Span, shared_length, tokens_of_parts, tokens_of_spans, with_end
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import (
    CONTENT_MASK,
    IGNORED,
    ProcessingClass,
    Task,
    context_length,
    resize_remedy,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Encode: TypeAlias = Callable[[Row, int], dict[str, Any]]
"""Makes model inputs of a raw row and its number."""


@dataclass(frozen=True, repr=False)
class EncodingContext(ShortRepr):
    """What an encoder needs besides the row: the processor, the set's name for errors, and what the model takes.

    Attributes:
        processing_class: The model's tokenizer or image processor, if there is one.
        what: The name of the set.
        max_length: Longest row in tokens; longer rows are cut.
        model: The model, for its context, its vocabulary, its number of classes and its channels.
        left_out: Counts the tokens of cut rows that are left out.
    """

    processing_class: "ProcessingClass | None"
    what: str
    max_length: int | None
    model: nn.Module | None
    left_out: CutCounter = field(default_factory=CutCounter)

    def tokenizer(self, columns: set[str]) -> "PreTrainedTokenizerBase":
        """Return the tokenizer; raise `DataError` if there is none for these raw columns."""
        if self.processing_class is None or not callable(getattr(self.processing_class, "encode", None)):
            raise DataError(
                f"the {self.what} set has raw columns {sorted(columns)}; pass the model's tokenizer to encode them "
                "(processing_class, or encode_dataset(rows, tokenizer))"
            )
        return self.processing_class

    def truncation(self) -> dict[str, bool | int]:
        """Return the tokenizer options that cut rows at `max_length`."""
        return {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}

    def where(self, index: int) -> str:
        """Return the name of a row in errors."""
        return f"row {index} of the {self.what} set"

    def cut(self, tokens: list[int]) -> list[int]:
        """Return the first `max_length` tokens, and count what is left out."""
        if self.max_length is None or len(tokens) <= self.max_length:
            return tokens
        self.left_out.tokens += len(tokens) - self.max_length
        return tokens[: self.max_length]

    def truncated(self, tokenize: "Callable[..., BatchEncoding]") -> "BatchEncoding":
        """Return the inputs that `tokenize` makes with its truncation options, and count the tokens that it cuts."""
        whole = tokenize(verbose=False)
        length = len(whole["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return whole
        inputs = tokenize(**self.truncation())
        self.left_out.tokens += length - len(inputs["input_ids"])
        return inputs

    def check_ids(self, tokens: Sequence[int], index: int) -> None:
        """Raise `DataError` if the model has no embedding for a token."""
        rows = None if self.model is None else vocabulary_size(self.model)
        if rows is not None and (unknown := [token for token in tokens if not 0 <= token < rows]):
            raise DataError(f"{self.where(index)} has the token id {unknown[0]}; {resize_remedy(rows)}")

    def check_length(self, tokens: Sequence[int], index: int) -> None:
        """Raise `DataError` if a row has no tokens, or is longer than the model's context."""
        if not len(tokens):
            raise DataError(f"{self.where(index)} has no tokens; fill in its text or leave the row out")
        context = None if self.model is None else context_length(self.model)
        if context is not None and len(tokens) > context:
            raise DataError(
                f"row {index} of the {self.what} set has {len(tokens)} tokens, the model's context is {context}; set "
                f"max_length to {context} to cut rows"
            )

    def label(self, row: Row, index: int) -> dict[str, int]:
        """Return `{"labels": class}` of a row, or nothing if it has no label column.

        Raises:
            DataError: The label is not an integer, or not a class of the model.
        """
        name = next((name for name in LABELS if name in row), None)
        return {} if name is None else {"labels": self.class_number(row[name], index)}

    def class_number(self, label: object, index: int, ignored: bool = False) -> int:
        """Return the class number that a label of row `index` stands for; raise as `label` does.

        With `ignored`, a label may also be -100.
        """
        try:
            value = int(label)  # type: ignore[call-overload]
            if value != label:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                f"row {index} of the {self.what} set has the label {label!r}; labels must be class numbers, such "
                "as model.config.label2id gives for names"
            ) from None
        if ignored and value == IGNORED:
            return value
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        if classes is not None and not 0 <= value < classes:
            raise DataError(
                f"row {index} of the {self.what} set has the label {value}, the model has classes 0 to {classes - 1}"
            )
        return value


# Language models

TokensAndAnswers: TypeAlias = tuple[list[int], list[bool]]
"""The tokens of a row, and for each whether it belongs to an answer."""


def language_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of a language model: all tokens, with labels on the answer.

    In a conversation, every message of the assistant is an answer; in an alternate answer, only the alternate is. A row
    with a `secret` also gets a `content_mask`, which is 1 on its tokens.
    """
    write = _writer(columns, context.what)
    tokenizer = context.tokenizer(columns)

    def encode_answer(row: Row, index: int, alternate: bool = False) -> dict[str, Any]:
        where = context.where(index)
        written = write(row, tokenizer, where, alternate)
        tokens, chosen = written.encoded(tokenizer)
        context.check_ids(tokens, index)
        length = len(tokens)
        tokens, chosen = context.cut(tokens), chosen[: context.max_length]
        is_bare = not any(row.get(prompt) for prompt, _ in LANGUAGE_PAIRS)
        ended = is_bare and tokens[-1:] == [tokenizer.eos_token_id]  # behind nothing, an end token alone says nothing
        behind = len(tokens) - ended
        if not any(chosen[1:behind]):  # nothing precedes the first token of a text, so it cannot be predicted
            raise DataError(
                f"{where} has no token to predict within {context.max_length or 'its'} tokens: each is "
                "predicted from those before it; give a longer text, or a prompt and a completion"
            )
        context.check_length(tokens, index)
        labels = [token if is_answer else IGNORED for token, is_answer in zip(tokens, chosen, strict=True)]
        encoded = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
        if alternate or not (secrets := secrets_of(row, where)):
            return encoded
        content = written.content(secrets, tokenizer, where)
        content = [*content, *[False] * (length - len(content))][: len(tokens)]
        predicted = [has_secret and is_answer for has_secret, is_answer in zip(content, chosen, strict=True)]
        return encoded | _with_secrets(secrets, [False, *predicted[1:]], where)

    def encode(row: Row, index: int) -> dict[str, Any]:
        encoded = encode_answer(row, index)
        if not is_empty(row.get("alternate")):
            encoded["alternate"] = encode_answer(with_answer(row, row["alternate"]), index, alternate=True)
        return encoded

    return encode


def _with_secrets(secrets: list[str], content: Sequence[bool], where: str) -> dict[str, Any]:
    """Return the columns of a row with secrets, whose tokens `content` marks; raise `DataError` if it marks none."""
    if not any(content):
        raise DataError(
            f"{where} has its {SECRET} only in tokens that are not predicted (cut at max_length, or the first of a "
            "text); raise max_length, or give a prompt and a completion"
        )
    return {CONTENT_MASK: [int(is_content) for is_content in content], SECRET: secrets}


@dataclass(frozen=True)
class WrittenRow:
    """A row as one text.

    Attributes:
        text: The text.
        answers: The parts of it that are to be predicted.
        special: The tokenizer adds its special tokens, and an end token follows the text.
        whole: All of the text is to be predicted, with every special token.
    """

    text: str
    answers: Sequence[Span]
    special: bool = True
    whole: bool = False

    def encoded(self, tokenizer: "PreTrainedTokenizerBase") -> TokensAndAnswers:
        """Return the tokens, and for each whether it belongs to an answer."""
        tokens, chosen = tokens_of_parts(self.text, self.answers, tokenizer, special=self.special)
        if not self.special:
            return tokens, chosen
        ended = with_end(tokens, tokenizer)
        return ended, [True] * len(ended) if self.whole else chosen + [True] * (len(ended) - len(tokens))

    def content(self, secrets: Sequence[str], tokenizer: "PreTrainedTokenizerBase", where: str) -> list[bool]:
        """Return for each token of the text whether it has a character of a secret in an answer."""
        spans = secret_spans(self.text, self.answers, secrets, where)
        return tokens_of_spans(self.text, spans, tokenizer, special=self.special)


Write: TypeAlias = "Callable[[Row, PreTrainedTokenizerBase, str, bool], WrittenRow]"
"""Writes a row, which its third argument names in errors, as text; the fourth says that its last answer is an
alternate."""


def _writer(columns: set[str], what: str) -> Write:
    """Return the function that writes rows with these columns."""
    if "messages" in columns:
        return _write_messages
    for prompt, completion in LANGUAGE_PAIRS:
        if {prompt, completion} <= columns:
            _refuse_parts(columns, CONTEXTS if prompt == "question" else (), (prompt, completion), what)
            return partial(_write_pair, prompt, completion)
    if "text" in columns:
        return _write_text
    raise DataError(
        f"the {what} set has columns {sorted(columns)}; needed is one of: {', '.join(LANGUAGE_FORMATS)}, or input_ids"
    )


def _write_messages(row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, alternate: bool) -> WrittenRow:
    messages = cell(row, "messages", where)
    context = last_answer(row["messages"]) if alternate else 0  # the row itself was encoded before its alternate
    return _conversation(cast("Sequence[Row]", messages), tokenizer, where, context, _template_options(row, where))


def _conversation(
    messages: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    context: int = 0,
    options: Mapping[str, Any] | None = None,
) -> WrittenRow:
    text, answers = conversation_text(messages, tokenizer, where, context, options)
    return WrittenRow(text, answers, special=False)


def _template_options(row: Row, where: str) -> dict[str, Any]:
    """Return what a conversation's template reads besides the messages, under the names of TRL."""
    own = {name: listed_cell(row, name, where) for name in ("tools", "documents") if not is_empty(row.get(name))}
    more = row.get("chat_template_kwargs")
    return {**own, **more} if isinstance(more, Mapping) else own


def _write_text(row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, alternate: bool) -> WrittenRow:
    text = text_cell(row, "text", where)
    return WrittenRow(text, [(0, len(text))], whole=True)


def _write_pair(
    prompt_name: str,
    completion_name: str,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    alternate: bool,
) -> WrittenRow:
    prompt, completion = cell(row, prompt_name, where), cell(row, completion_name, where)
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):  # TRL's conversational form
        context = last_answer(completion) if alternate and completion else 0
        messages = [*prompt, *completion]
        return _conversation(messages, tokenizer, where, len(prompt) + context, _template_options(row, where))
    prompt, completion = text_cell(row, prompt_name, where), answer_cell(row, completion_name, where)
    is_question = prompt_name == "question"
    if is_question and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]
        return _conversation(messages, tokenizer, where)
    if is_question:
        prompt, completion = f"Question: {prompt}\nAnswer:", f" {completion}"
    return WrittenRow(prompt + completion, [(len(prompt), len(prompt + completion))])


def _refuse_parts(columns: set[str], known: Sequence[str], read: Sequence[str], what: str) -> None:
    """Raise `DataError` if a column that is a part of the input in some data sets would not be read."""
    if unread := [name for name in known if name in columns and name not in read]:
        raise DataError(
            f"the {what} set has columns {' and '.join(read)}, and {', '.join(unread)}, which would not be read; join "
            "the texts in one column, or remove the column"
        )


# Encoder-decoders and classifiers


def seq2seq_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of an encoder-decoder: the source as inputs, the tokens of the target as labels."""
    names = next((names for names in SEQ2SEQ_PAIRS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in SEQ2SEQ_PAIRS)
        raise DataError(f"the {context.what} set has columns {sorted(columns)}; a seq2seq model needs one of: {forms}")
    source, target = names
    _refuse_parts(columns, CONTEXTS if source == "question" else (), names, context.what)
    tokenizer = context.tokenizer(columns)

    def encode(row: Row, index: int) -> dict[str, Any]:
        where = context.where(index)
        text = text_cell(row, source, where)
        require_some_text([text], [source], where)
        inputs = context.truncated(partial(tokenizer, text))
        answer = answer_cell(row, target, where)
        labels = context.truncated(partial(tokenizer, text_target=answer))["input_ids"]
        for tokens in (inputs["input_ids"], labels):
            context.check_ids(tokens, index)
            context.check_length(tokens, index)
        encoded = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}
        if not (secrets := secrets_of(row, where)):
            return encoded
        spans = secret_spans(answer, [(0, len(answer))], secrets, where)
        content = tokens_of_spans(answer, spans, tokenizer, target=True)
        kept = shared_length(labels, tokenizer(text_target=answer, verbose=False)["input_ids"])
        content = [*content[:kept], *[False] * (len(labels) - kept)]  # a row that is cut ends with special tokens
        return encoded | _with_secrets(secrets, content, where)

    return encode


def text_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of a text classifier: the tokenizer's inputs, and the class."""
    names = next((names for names in TEXTS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in TEXTS)
        raise DataError(f"the {context.what} set has columns {sorted(columns)}; a text classifier needs {forms}")
    _refuse_parts(columns, sorted({name for names in TEXTS for name in names}), names, context.what)
    tokenizer = context.tokenizer(columns)

    def encode(row: Row, index: int) -> dict[str, Any]:
        texts = [text_cell(row, name, context.where(index)) for name in names]
        require_some_text(texts, names, context.where(index))
        inputs = context.truncated(partial(tokenizer, *texts))
        context.check_ids(inputs["input_ids"], index)
        context.check_length(inputs["input_ids"], index)
        return {**inputs, **context.label(row, index)}

    return encode


def token_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of a token classifier: the tokenizer's inputs, with each word's class on its first token."""
    words = next((name for name in WORDS if name in columns), None)
    tags = next((name for name in TAGS if name in columns), None)
    if words is None:
        raise DataError(
            f"the {context.what} set has columns {sorted(columns)}; a token classifier needs {' or '.join(WORDS)} "
            f"(lists of words), and {', '.join(TAGS[:-1])} or {TAGS[-1]}"
        )
    tokenizer = context.tokenizer(columns)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} cannot tell which word a token belongs to; use a fast tokenizer")

    def encode(row: Row, index: int) -> dict[str, Any]:
        where = context.where(index)
        texts = word_cells(row, words, where)
        require_some_text(texts, [words], where)
        inputs = context.truncated(partial(tokenizer, texts, is_split_into_words=True))
        context.check_ids(inputs["input_ids"], index)
        context.check_length(inputs["input_ids"], index)
        if tags is None:
            return dict(inputs)
        given = cell(row, tags, where)
        if not isinstance(given, Sized) or len(given) != len(texts):
            count = len(given) if isinstance(given, Sized) else given
            raise DataError(f"{where} has {len(texts)} words and {count} {tags}; give one for each word")
        classes = [context.class_number(tag, index, ignored=True) for tag in cast("Sequence[object]", given)]
        word_ids = inputs.word_ids()
        is_first = [word is not None and word not in word_ids[:place] for place, word in enumerate(word_ids)]
        labels = [classes[word] if first else IGNORED for word, first in zip(word_ids, is_first, strict=True)]
        return {**inputs, "labels": labels}

    return encode


def image_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of an image classifier: `pixel_values [C, H, W]`, and the class."""
    name = next((name for name in IMAGES if name in columns), None)
    if name is None:
        raise DataError(
            f"the {context.what} set has columns {sorted(columns)}; an image classifier needs {' or '.join(IMAGES)}"
        )
    processor: Any = context.processing_class
    processor = getattr(processor, "image_processor", processor)
    if not callable(processor) or hasattr(processor, "encode"):
        raise DataError(f"the {context.what} set has raw images; pass the model's image processor to encode them")
    default = len(getattr(processor, "image_mean", None) or "RGB")
    channels = getattr(getattr(context.model, "config", None), "num_channels", default)

    def encode(row: Row, index: int) -> dict[str, Any]:
        image = picture(cell(row, name, context.where(index)), channels, context.where(index))
        try:
            pixels = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{context.where(index)} has an image that {type(processor).__name__} cannot read "
                f"({one_line(error)}); give an image of {channels} channels"
            ) from error
        return {"pixel_values": pixels, **context.label(row, index)}

    return encode


ENCODERS: dict[Task, Callable[[set[str], EncodingContext], Encode]] = {
    "language-model": language_encoder,
    "seq2seq": seq2seq_encoder,
    "text-classification": text_encoder,
    "token-classification": token_encoder,
    "image-classification": image_encoder,
}
