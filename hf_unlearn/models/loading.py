"""Loading models, tokenizers and image processors by name."""

import os
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
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

MODELS: dict[Task, Any] = {
    "language-model": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}


def load_model(name: str, task: Task = "language-model") -> nn.Module:
    """A model in float32 (bf16 weights lose steps of relative size 1e-3), in eval mode; a head that it lacks is drawn
    by a fixed seed.

    It is put on this process's device: collecting comes before any Trainer would do so.
    """
    try:
        with loaded_whole(), torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[task].from_pretrained(name, dtype=torch.float32).eval().to(PartialState().device)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load model {name!r}: {str(error).splitlines()[0]}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or Hub id, padding with its end token if it has no own one."""
    if not name:  # the first thing that any command loads
        raise ModelError("no model was named; pass --model_name_or_path with a folder or Hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(name: str, task: Task) -> Any:
    """The tokenizer of a model folder or Hub id, or its image processor where the task is one of images."""
    if task not in MODELS:
        raise SettingsError(f"unknown task {task!r}; choose from {', '.join(MODELS)}")
    if task != "image-classification":
        return load_tokenizer(name)
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the image processor of {name!r}: {str(error).splitlines()[0]}") from error


def load_named(name: str | os.PathLike, processing_class: Any) -> tuple[nn.Module, Any]:
    """A model in float32, of the class that its configuration names, and its tokenizer or image processor.

    Without a class with a head it is loaded as a causal language model.

    Raises:
        ModelError: One of them cannot be loaded.
    """
    try:
        architecture = (AutoConfig.from_pretrained(name).architectures or [""])[0]
        has_head = "For" in architecture or "LMHead" in architecture
        kind = getattr(transformers, architecture, AutoModelForCausalLM) if has_head else AutoModelForCausalLM
        with loaded_whole():
            model = kind.from_pretrained(name, dtype=torch.float32)
        return model, processing_class or AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {str(name)!r} and its processor: {str(error).splitlines()[0]}") from error
