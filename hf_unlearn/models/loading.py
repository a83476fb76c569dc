"""Loading models, tokenizers and image processors from a local folder or the Hub.

Every function raises `ModelError` with the name and the first line of the cause if something cannot be loaded, and
loads models in float32: bfloat16 weights lose steps of relative size 1e-3.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
)

from hf_unlearn.core.sharding import loaded_whole
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.tasks import Task

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

MODELS: dict[Task, Any] = {
    "language-model": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
"""The auto class of each task."""


def load_model(name: str, task: Task = "language-model") -> "PreTrainedModel":
    """Load a model for `task` in eval mode, on this process's device, because statistics come before any Trainer.

    A head that the checkpoint lacks is drawn with a fixed seed.

    Raises:
        ModelError: The model cannot be loaded.
        SettingsError: The task is unknown.
    """
    model_class = _auto_class(task)
    with _loading("the model", name), loaded_whole(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class.from_pretrained(name, dtype=torch.float32).eval().to(PartialState().device)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a padding token pads with its end token.

    >>> load_tokenizer("")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.ModelError: no model was named; pass --model_name_or_path with a folder or Hub id

    Raises:
        ModelError: The name is empty, or the tokenizer cannot be loaded.
    """
    if not name:  # the tokenizer is the first thing that a command loads
        raise ModelError("no model was named; pass --model_name_or_path with a folder or Hub id")
    with _loading("the tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(name: str, task: Task) -> "PreTrainedTokenizerBase | BaseImageProcessor":
    """Load the image processor of a model if the task is image classification, otherwise its tokenizer.

    >>> load_processor("some/model", "translation")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: unknown task 'translation'; choose from language-model, seq2seq, ...

    Raises:
        ModelError: It cannot be loaded.
        SettingsError: The task is unknown.
    """
    _auto_class(task)
    if task != "image-classification":
        return load_tokenizer(name)
    with _loading("the image processor of", name):
        return AutoImageProcessor.from_pretrained(name)


def load_model_and_processor(
    name: str | os.PathLike[str], processing_class: "ProcessorMixin | None" = None
) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Load a model of the class that its configuration names, and its tokenizer or image processor if none is passed.

    A model whose configuration names no class with a head is loaded as a causal language model. It stays on the CPU:
    the Trainer decides where it goes.

    Raises:
        ModelError: One of them cannot be loaded.
    """
    with _loading("the model and its processor", name):
        architecture = (AutoConfig.from_pretrained(name).architectures or [""])[0]
        has_head = "For" in architecture or "LMHead" in architecture
        model_class: Any = getattr(transformers, architecture, None) if has_head else None
        with loaded_whole():
            model = (model_class or AutoModelForCausalLM).from_pretrained(name, dtype=torch.float32)
        return model, processing_class or AutoProcessor.from_pretrained(name)


def _auto_class(task: Task) -> Any:
    if task not in MODELS:
        raise SettingsError(f"unknown task {task!r}; choose from {', '.join(MODELS)}")
    return MODELS[task]


@contextmanager
def _loading(what: str, name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what transformers raises if something does not exist or cannot be read into a `ModelError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {what} {str(name)!r}: {str(error).splitlines()[0]}") from error
