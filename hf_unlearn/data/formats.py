"""Row formats of each task: from one raw row to what a model takes.

Language models: TRL's `messages`, `prompt`/`completion`, `text`, `question`/`answer` (TOFU's columns) and `prompt`/`gt`
(MUSE's), each with an `alternate` answer if there is one. Text classification: `text` or `sentence`, or a pair of
sentences, and `label`. Token classification: `tokens` or `words`, and a tag for each (`ner_tags`, `pos_tags`, `tags`,
`labels`). Seq2seq: `source`/`target`, `text`/`summary`, `document`/`summary`, `article`/`highlights`, or TRL's and
TOFU's pairs. Image classification: `image` or `img`, and `label`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import IGNORED, Task, context_length

Row = Mapping[str, Any]
Encode = Callable[[Row, int], dict[str, Any]]
FORMATS = ("messages", "prompt + completion", "question + answer", "text")
TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"))
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "pos_tags", "tags", "labels")
PAIRS = (
    ("source", "target"), ("text", "summary"), ("document", "summary"), ("article", "highlights"),
    ("prompt", "completion"), ("question", "answer"), ("text", "target"),
)  # fmt: skip
IMAGES = ("image", "img")
LABELS = ("label", "labels", "label_ids")


@dataclass(frozen=True)
class Encoding:
    """What the encoders of every task are given: the processor, the set's name for errors, and what the model takes."""

    processing_class: Any
    what: str
    max_length: int | None
    model: nn.Module | None

    def tokenizer(self, columns: set[str]) -> Any:
        if self.processing_class is None or not callable(getattr(self.processing_class, "encode", None)):
            raise DataError(
                f"the {self.what} set has raw columns {sorted(columns)}; pass the model's tokenizer to encode them"
            )
        return self.processing_class

    def check_length(self, tokens: Sequence[int], index: int) -> None:
        """Raise `DataError` where a row is longer than the model's context."""
        context = None if self.model is None else context_length(self.model)
        if context is not None and len(tokens) > context:
            raise DataError(
                f"row {index} of the {self.what} set has {len(tokens)} tokens, the model's context is {context}; set "
                f"max_length to {context} to have rows cut"
            )

    def label(self, row: Row, index: int) -> dict[str, int]:
        """`{"labels": class}` of a row, or nothing where it has no label column.

        Raises:
            DataError: A label that is no whole number, or no class of the model.
        """
        name = next((name for name in LABELS if name in row), None)
        return {} if name is None else {"labels": self.class_number(row[name], index)}

    def class_number(self, label: Any, index: int) -> int:
        """The class number that a label of row `index` is; errors as of `label`."""
        try:
            value = int(label)
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


def text_encoder(columns: set[str], encoding: Encoding) -> Encode:
    """Rows of a language model: tokens, and labels on what is answered."""
    split = _splitter(columns, encoding.what)
    tokenizer = encoding.tokenizer(columns)

    def one(row: Row, index: int) -> dict[str, Any]:
        prompt, whole = split(row, tokenizer)
        prompt, whole = prompt[: encoding.max_length], whole[: encoding.max_length]
        if max(len(prompt), 1) >= len(whole):  # nothing comes before a text's first token to predict it from
            raise DataError(
                f"row {index} of the {encoding.what} set has no token to predict within "
                f"{encoding.max_length or 'its'} tokens"
            )
        encoding.check_length(whole, index)
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}

    def encode(row: Row, index: int) -> dict[str, Any]:
        encoded = one(row, index)
        if row.get("alternate"):
            encoded["alternate"] = one(with_answer(row, row["alternate"]), index)
        return encoded

    return encode


def with_answer(row: Row, answer: Any) -> dict[str, Any]:
    """The row with another answer in the place of its own: a text, or in conversations also a list of messages."""
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], *messages]}
    if "completion" in row:
        return {**row, "completion": answer if isinstance(row["completion"], str) else messages}
    return {**row, "answer" if "answer" in row else "text": answer}


def _splitter(columns: set[str], what: str) -> Callable[[Row, Any], tuple[list[int], list[int]]]:
    """How rows of these columns become (prompt tokens, all tokens)."""
    if "messages" in columns:
        return lambda row, tokenizer: _encode_chat(row["messages"], tokenizer)
    for prompt, completion in (("prompt", "completion"), ("question", "answer"), ("prompt", "gt")):
        if {prompt, completion} <= columns:
            return lambda row, tokenizer: _encode_pair(row[prompt], row[completion], tokenizer, prompt == "question")
    if "text" in columns:
        return lambda row, tokenizer: ([], _close(tokenizer.encode(row["text"]), tokenizer))
    raise DataError(
        f"the {what} set has columns {sorted(columns)}; needed is one of: {', '.join(FORMATS)}, or input_ids"
    )


def _encode_pair(prompt: Any, completion: Any, tokenizer: Any, is_question: bool) -> tuple[list[int], list[int]]:
    if not isinstance(prompt, str):  # TRL's conversational form: two lists of messages
        return _encode_chat([*prompt, *completion], tokenizer)
    if is_question and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat(messages, tokenizer)
    if is_question:
        prompt, completion = f"Question: {prompt}\nAnswer:", f" {completion}"
    head = tokenizer.encode(prompt)
    tail = tokenizer.encode(completion, add_special_tokens=False)
    return head, _close(head + tail, tokenizer)


def _encode_chat(messages: Sequence[Row], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the rows are messages, but the tokenizer has no chat template; use prompt + completion rows")
    options = {"tokenize": True, "return_dict": False}
    whole = tokenizer.apply_chat_template(messages, **options)
    if len(messages) < 2:
        return [], whole
    head = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    # a template may write the prompt otherwise once an answer follows: what both begin with is prompt for certain
    differ = (i for i, (left, right) in enumerate(zip(head, whole, strict=False)) if left != right)
    return whole[: next(differ, len(head))], whole


def _close(tokens: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


def sentence_encoder(columns: set[str], encoding: Encoding) -> Encode:
    """Rows of a text classifier: the tokenizer's inputs, and the class."""
    names = next((names for names in TEXTS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in TEXTS)
        raise DataError(f"the {encoding.what} set has columns {sorted(columns)}; a text classifier needs {forms}")
    tokenizer = encoding.tokenizer(columns)
    limit = {"truncation": True, "max_length": encoding.max_length} if encoding.max_length is not None else {}

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(*(row[name] for name in names), **limit)
        encoding.check_length(inputs["input_ids"], index)
        return {**inputs, **encoding.label(row, index)}

    return encode


def token_encoder(columns: set[str], encoding: Encoding) -> Encode:
    """Rows of a token classifier: the tokenizer's inputs, and of each word's first token the word's class."""
    words = next((name for name in WORDS if name in columns), None)
    tags = next((name for name in TAGS if name in columns), None)
    if words is None:
        raise DataError(
            f"the {encoding.what} set has columns {sorted(columns)}; a token classifier needs {' or '.join(WORDS)} "
            f"(lists of words), and {', '.join(TAGS[:-1])} or {TAGS[-1]}"
        )
    tokenizer = encoding.tokenizer(columns)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} cannot tell which word a token is of; use a fast tokenizer")
    limit = {"truncation": True, "max_length": encoding.max_length} if encoding.max_length is not None else {}

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(list(row[words]), is_split_into_words=True, **limit)
        encoding.check_length(inputs["input_ids"], index)
        if tags is None:
            return dict(inputs)
        if len(row[tags]) != len(row[words]):
            raise DataError(
                f"row {index} of the {encoding.what} set has {len(row[words])} words and {len(row[tags])} {tags}; "
                "needed is one for each word"
            )
        classes = [IGNORED if tag == IGNORED else encoding.class_number(tag, index) for tag in row[tags]]
        places = inputs.word_ids()
        first = [place is not None and place not in places[:number] for number, place in enumerate(places)]
        labels = [classes[place] if new else IGNORED for place, new in zip(places, first, strict=True)]
        return {**inputs, "labels": labels}

    return encode


def pair_encoder(columns: set[str], encoding: Encoding) -> Encode:
    """Rows of an encoder-decoder: the tokenizer's inputs of the source, and the target's tokens as labels."""
    names = next((names for names in PAIRS if set(names) <= columns), None)
    if names is None:
        forms = ", ".join(" + ".join(names) for names in PAIRS)
        raise DataError(f"the {encoding.what} set has columns {sorted(columns)}; a seq2seq model needs one of: {forms}")
    tokenizer = encoding.tokenizer(columns)
    source, target = names
    limit = {"truncation": True, "max_length": encoding.max_length} if encoding.max_length is not None else {}

    def encode(row: Row, index: int) -> dict[str, Any]:
        inputs = tokenizer(row[source], **limit)
        labels = tokenizer(text_target=row[target], **limit)["input_ids"]
        if not labels:
            raise DataError(f"row {index} of the {encoding.what} set has no token to predict: its {target} is empty")
        for tokens in (inputs["input_ids"], labels):
            encoding.check_length(tokens, index)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}

    return encode


def image_encoder(columns: set[str], encoding: Encoding) -> Encode:
    """Rows of an image classifier: `pixel_values [C, H, W]`, and the class."""
    name = next((name for name in IMAGES if name in columns), None)
    if name is None:
        raise DataError(
            f"the {encoding.what} set has columns {sorted(columns)}; an image classifier needs {' or '.join(IMAGES)}"
        )
    processor = encoding.processing_class
    processor = getattr(processor, "image_processor", processor)
    if not callable(processor) or hasattr(processor, "encode"):
        raise DataError(f"the {encoding.what} set has raw images; pass the model's image processor to encode them")
    default = len(getattr(processor, "image_mean", None) or "RGB")
    channels = getattr(getattr(encoding.model, "config", None), "num_channels", default)

    def encode(row: Row, index: int) -> dict[str, Any]:
        image = row[name]
        if channels == 3 and getattr(image, "mode", "RGB") != "RGB":  # grey and palette images
            image = image.convert("RGB")
        pixels = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        return {"pixel_values": pixels, **encoding.label(row, index)}

    return encode


ENCODERS: dict[Task, Callable[[set[str], Encoding], Encode]] = {
    "language-model": text_encoder,
    "seq2seq": pair_encoder,
    "text-classification": sentence_encoder,
    "token-classification": token_encoder,
    "image-classification": image_encoder,
}

MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_features", "input_values")
