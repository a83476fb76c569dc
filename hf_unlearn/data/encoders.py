"""One encoder per task: a function from a raw row and its number to model inputs.

An encoder is made once per data set from its columns (`formats`) and an `EncodingContext`, then applied to each row
(`encoding.encode_dataset`). It raises `DataError` with the number of the row and the name of the set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from hf_unlearn.data.formats import (
    IMAGES,
    LABELS,
    LANGUAGE_FORMATS,
    LANGUAGE_PAIRS,
    SEQ2SEQ_PAIRS,
    TAGS,
    TEXTS,
    WORDS,
    Row,
    with_answer,
)
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import IGNORED, ProcessingClass, Task, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode: TypeAlias = Callable[[Row, int], dict[str, Any]]
"""Makes model inputs of a raw row and its number."""


@dataclass(frozen=True)
class EncodingContext:
    """What an encoder needs besides the row: the processor, the set's name for errors, and what the model takes.

    Attributes:
        processing_class: The model's tokenizer or image processor, if there is one.
        what: The name of the set.
        max_length: Longest row in tokens; longer rows are cut.
        model: The model, for its context, its number of classes and its channels.
    """

    processing_class: "ProcessingClass | None"
    what: str
    max_length: int | None
    model: nn.Module | None

    def tokenizer(self, columns: set[str]) -> "PreTrainedTokenizerBase":
        """Return the tokenizer; raise `DataError` if there is none for these raw columns."""
        if self.processing_class is None or not callable(getattr(self.processing_class, "encode", None)):
            raise DataError(
                f"the {self.what} set has raw columns {sorted(columns)}; pass the model's tokenizer to encode them"
            )
        return self.processing_class

    def truncation(self) -> dict[str, bool | int]:
        """Return the tokenizer options that cut rows at `max_length`."""
        return {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}

    def check_length(self, tokens: Sequence[int], index: int) -> None:
        """Raise `DataError` if a row is longer than the model's context."""
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

    def class_number(self, label: object, index: int) -> int:
        """Return the class number that a label of row `index` stands for; raise as `label` does."""
        try:
            value = int(label)  # type: ignore[call-overload]
            if value != label:
                raise ValueError
        except (TypeError, ValueError):
            raise DataError(
                f"row {index} of the {self.what} set has the label {label!r}; labels must be class numbers, such "
                "as model.config.label2id gives for names"
            ) from None
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        if classes is not None and not 0 <= value < classes:
            raise DataError(
                f"row {index} of the {self.what} set has the label {value}, the model has classes 0 to {classes - 1}"
            )
        return value


# Language models


def language_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of a language model: all tokens, with labels on the answer."""
    split = _splitter(columns, context.what)
    tokenizer = context.tokenizer(columns)

    def encode_answer(row: Row, index: int) -> dict[str, Any]:
        prompt, tokens = split(row, tokenizer)
        prompt, tokens = prompt[: context.max_length], tokens[: context.max_length]
        if max(len(prompt), 1) >= len(tokens):  # nothing precedes the first token of a text, so it cannot be predicted
            raise DataError(
                f"row {index} of the {context.what} set has no token to predict within "
                f"{context.max_length or 'its'} tokens"
            )
        context.check_length(tokens, index)
        labels = [IGNORED] * len(prompt) + tokens[len(prompt) :]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def encode(row: Row, index: int) -> dict[str, Any]:
        encoded = encode_answer(row, index)
        if row.get("alternate"):
            encoded["alternate"] = encode_answer(with_answer(row, row["alternate"]), index)
        return encoded

    return encode


PromptAndAll: TypeAlias = tuple[list[int], list[int]]
"""The tokens of the prompt, and all tokens, which begin with those of the prompt."""


def _splitter(columns: set[str], what: str) -> "Callable[[Row, PreTrainedTokenizerBase], PromptAndAll]":
    """Return the function that tokenizes rows with these columns."""
    if "messages" in columns:
        return lambda row, tokenizer: _encode_chat(row["messages"], tokenizer)
    for prompt, completion in LANGUAGE_PAIRS:
        if {prompt, completion} <= columns:
            return lambda row, tokenizer: _encode_pair(row[prompt], row[completion], tokenizer, prompt == "question")
    if "text" in columns:
        return lambda row, tokenizer: ([], _with_end(tokenizer.encode(row["text"]), tokenizer))
    raise DataError(
        f"the {what} set has columns {sorted(columns)}; needed is one of: {', '.join(LANGUAGE_FORMATS)}, or input_ids"
    )


def _encode_pair(
    prompt: Any,
    completion: Any,
    tokenizer: "PreTrainedTokenizerBase",
    is_question: bool,
) -> PromptAndAll:
    if not isinstance(prompt, str):  # TRL's conversational form: two lists of messages
        return _encode_chat([*prompt, *completion], tokenizer)
    if is_question and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat(messages, tokenizer)
    if is_question:
        prompt, completion = f"Question: {prompt}\nAnswer:", f" {completion}"
    prompt_tokens = tokenizer.encode(prompt)
    answer_tokens = tokenizer.encode(completion, add_special_tokens=False)
    return prompt_tokens, _with_end(prompt_tokens + answer_tokens, tokenizer)


def _encode_chat(messages: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> PromptAndAll:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the rows are messages, but the tokenizer has no chat template; use prompt + completion rows")
    options = {"tokenize": True, "return_dict": False}
    tokens = tokenizer.apply_chat_template(messages, **options)
    if len(messages) < 2:
        return [], tokens
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    # a template may write the prompt differently before an answer: only what both begin with is certainly the prompt
    differ = (i for i, (left, right) in enumerate(zip(prompt, tokens, strict=False)) if left != right)
    return tokens[: next(differ, len(prompt))], tokens


def _with_end(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    end = tokenizer.eos_token_id
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


# Encoder-decoders and classifiers


def seq2seq_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of an encoder-decoder: the source as inputs, the tokens of the target as labels."""
    names = next((names for names in SEQ2SEQ_PAIRS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in SEQ2SEQ_PAIRS)
        raise DataError(f"the {context.what} set has columns {sorted(columns)}; a seq2seq model needs one of: {forms}")
    tokenizer, truncation = context.tokenizer(columns), context.truncation()
    source, target = names

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(row[source], **truncation)
        labels = tokenizer(text_target=row[target], **truncation)["input_ids"]
        if not labels:
            raise DataError(f"row {index} of the {context.what} set has no token to predict: its {target} is empty")
        for tokens in (inputs["input_ids"], labels):
            context.check_length(tokens, index)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}

    return encode


def text_encoder(columns: set[str], context: EncodingContext) -> Encode:
    """Return the encoder of a text classifier: the tokenizer's inputs, and the class."""
    names = next((names for names in TEXTS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in TEXTS)
        raise DataError(f"the {context.what} set has columns {sorted(columns)}; a text classifier needs {forms}")
    tokenizer, truncation = context.tokenizer(columns), context.truncation()

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(*(row[name] for name in names), **truncation)
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
    tokenizer, truncation = context.tokenizer(columns), context.truncation()
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} cannot tell which word a token belongs to; use a fast tokenizer")

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(list(row[words]), is_split_into_words=True, **truncation)
        context.check_length(inputs["input_ids"], index)
        if tags is None:
            return dict(inputs)
        if len(row[tags]) != len(row[words]):
            raise DataError(
                f"row {index} of the {context.what} set has {len(row[words])} words and {len(row[tags])} {tags}; "
                "give one for each word"
            )
        classes = [IGNORED if tag == IGNORED else context.class_number(tag, index) for tag in row[tags]]
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
        image = row[name]
        if channels == 3 and getattr(image, "mode", "RGB") != "RGB":  # grey and palette images
            image = image.convert("RGB")
        pixels = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        return {"pixel_values": pixels, **context.label(row, index)}

    return encode


ENCODERS: dict[Task, Callable[[set[str], EncodingContext], Encode]] = {
    "language-model": language_encoder,
    "seq2seq": seq2seq_encoder,
    "text-classification": text_encoder,
    "token-classification": token_encoder,
    "image-classification": image_encoder,
}
