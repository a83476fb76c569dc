"""Loading models, tokenizers and image processors from a local folder or the Hub.

Every function raises `ModelError` with the name and the cause in one line if something cannot be loaded, and loads
models in float32: bfloat16 weights lose steps of relative size 1e-3. A model is loaded with all of its weights or not
at all: a head that is left out or drawn at random would be another model.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from transformers.models.auto import modeling_auto

from hf_unlearn.core.registry import suggestion
from hf_unlearn.core.sharding import loaded_whole
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import ModelError, SettingsError, UnlearningError
from hf_unlearn.models.tasks import Task

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

MODELS: dict[Task, Any] = {
    "language-model": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
"""The auto class of each task."""

_ARCHITECTURES: dict[Task, Mapping[str, Any]] = {
    "language-model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
"""The names of the model classes of each task, by model type; some model types have several."""

_ENDINGS: dict[str, Task] = {
    "ForCausalLM": "language-model",
    "LMHeadModel": "language-model",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
"""Tasks by the end of the name, for classes that transformers does not have."""


# The task


def read_config(name: str) -> "PretrainedConfig":
    """Return the configuration of a folder, a `config.json` or a Hub id; no weights are read.

    A folder or repository of an adapter has the configuration of its base model.

    Raises:
        ModelError: There is no configuration, or its model needs code of its own.
    """
    if not name:
        raise ModelError("no model was named; pass --model_name_or_path with a folder or Hub id")
    adapter = adapter_settings(name)
    if adapter is not None and not os.path.isfile(os.path.join(name, "config.json")):
        name = str(adapter.get("base_model_name_or_path") or name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(f"{name!r} needs code of its own (trust_remote_code), which is not executed") from error
        reason = "there is no such folder" if _is_missing_path(name) else one_line(error)
        raise ModelError(f"cannot load the model {name!r}: cannot read the configuration: {reason}") from error


def _is_missing_path(name: str) -> bool:
    """Return whether a name is that of a folder and not of a repository, and there is no such folder."""
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not os.path.exists(name)


def adapter_settings(name: str) -> dict[str, Any] | None:
    """Return the `adapter_config.json` of a local folder, or None if it has none.

    Raises:
        ModelError: The file is damaged.
    """
    path = os.path.join(name, "adapter_config.json")
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the adapter {path}: {one_line(error)}") from error


def architecture(config: "PretrainedConfig") -> str:
    """Return the name of the class that a configuration was saved with, or an empty one."""
    return (getattr(config, "architectures", None) or [""])[0]


def trained_task(config: "PretrainedConfig") -> Task | None:
    """Return the task that a model was trained for, by the class that its configuration names, or None if unknown.

    A base model without a head, and one that predicts masked words, has none.

    >>> from transformers import BertConfig
    >>> trained_task(BertConfig(architectures=["BertForSequenceClassification"]))
    'text-classification'
    >>> trained_task(BertConfig(architectures=["BertForMaskedLM"]))
    """
    name = architecture(config)
    named: list[Task] = [task for task, names in _ARCHITECTURES.items() if _has_class(names, name)]
    if len(named) > 1:  # the head of one class serves two tasks, such as an encoder-decoder that is listed for both
        return "seq2seq" if getattr(config, "is_encoder_decoder", False) and "seq2seq" in named else named[0]
    if named:
        return named[0]
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "language-model"
    return next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), None)


def _has_class(names: Mapping[str, Any], name: str) -> bool:
    return any(name == value or (not isinstance(value, str) and name in value) for value in names.values())


def choose_task(name: str, task: Task | None, *, new_head: bool = False) -> Task:
    """Return the task of a model: the one that its configuration names, which `task` must not contradict.

    Args:
        name: Folder or Hub id.
        task: The task that was asked for, or None.
        new_head: The model is fine-tuned first. Then a base model, and a language model for another task, may get a
            new head.

    Raises:
        ModelError: There is no configuration, the configuration names no task, or the model has no head for it.
        SettingsError: An unknown task, or another one than the model's.
    """
    if task is not None:
        _auto_class(task)
    config = read_config(name)
    trained, seen = trained_task(config), architecture(config) or "a model of an unknown class"
    if trained is None and task is None:
        raise ModelError(
            f"{name!r} is {seen}, which is a model of no task that can be unlearned; pass --task ({', '.join(MODELS)})"
            " and --fine_tune True to train a new head, or another model"
        )
    if trained is None and not new_head and _is_headless(config):
        raise ModelError(
            f"{name!r} is {seen}, which has no head for {task}; pass a model that was trained for it, or --fine_tune "
            "True to train a new head"
        )
    if task is None or trained is None:
        return task or trained  # type: ignore[return-value]
    if task == trained or (new_head and trained == "language-model"):
        return task
    raise SettingsError(
        f"{name!r} is {seen}, a model of task {trained}, and --task is {task}; leave out --task, or pass another model"
    )


def makes_new_head(config: "PretrainedConfig", task: Task) -> bool:
    """Return whether a model that is loaded for `task` gets a head that its checkpoint does not have."""
    return trained_task(config) != task and (trained_task(config) is not None or _is_headless(config))


def _is_headless(config: "PretrainedConfig") -> bool:
    """Return whether a configuration names a base model, or one with a head for pretraining or masked words."""
    name = architecture(config)
    others = (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    )
    return any(_has_class(names, name) for names in others)


# Models


def load_model(
    name: str,
    task: Task | None = None,
    *,
    new_head: bool = False,
    classes: Sequence[str] | None = None,
) -> "PreTrainedModel":
    """Load a model for `task` in eval mode, on this process's device, because statistics come before any Trainer.

    Args:
        name: Folder or Hub id.
        task: The task; default: the one that the configuration names, or else `language-model`.
        new_head: Draw the weights of a head that the checkpoint lacks, with a fixed seed, and leave out the head that
            it has: the model is fine-tuned next. A warning says so.
        classes: Names of the classes of a new head.

    Raises:
        ModelError: The model cannot be loaded, or not with all of its weights.
        SettingsError: The task is unknown.
    """
    model_class: Any = None if task is None else _auto_class(task)
    with _loading("the model", name), loaded_whole(), torch.random.fork_rng():
        torch.manual_seed(0)
        if model_class is None:
            model_class = MODELS[trained_task(read_config(name)) or "language-model"]
        head = head_settings(classes) if new_head and classes is not None else {}
        model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **head)
    check_loaded(name, model, info, new_head=new_head)
    return model.eval().to(PartialState().device)


def head_settings(classes: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a configuration for a head with these classes.

    >>> head_settings(["no", "yes"])
    {'num_labels': 2, 'id2label': {0: 'no', 1: 'yes'}, 'label2id': {'no': 0, 'yes': 1}}
    """
    names = dict(enumerate(classes))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: number for number, name in names.items()}}


def outline(
    name: str, task: Task, *, new_head: bool = False, classes: Sequence[str] | None = None
) -> "PreTrainedModel":
    """Return the model that `load_model` will load, without weights: its layers, context, classes and vocabulary.

    Raises:
        ModelError: There is no such model of this task.
        SettingsError: The task is unknown.
    """
    config, model_class = read_config(name), _auto_class(task)
    for key, value in (head_settings(classes) if new_head and classes is not None else {}).items():
        setattr(config, key, value)
    try:
        with torch.device("meta"), loaded_whole():
            return model_class.from_config(config).eval()
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(f"{name!r} has no model of task {task} (--task): {one_line(error, 160)}") from error


def check_loaded(
    name: str | os.PathLike[str], model: "PreTrainedModel", info: Mapping[str, Any], *, new_head: bool = False
) -> None:
    """Raise `ModelError` if weights of a checkpoint were left out, or weights of the model were drawn at random.

    Args:
        name: Folder or Hub id.
        model: The loaded model.
        info: What `from_pretrained(output_loading_info=True)` returned.
        new_head: A head may be new; this warns instead. Other weights may not.
    """
    missing, left_out = sorted(info.get("missing_keys", ())), sorted(info.get("unexpected_keys", ()))
    if not missing and not left_out:
        return
    kind, texts = type(model).__name__, []
    texts += [f"lacks {_some(missing)}, which would be drawn at random"] if missing else []
    texts += [f"has {_some(left_out)}, which would be left out"] if left_out else []
    prefix = f"{model.base_model_prefix}."
    body = [weight for weight in missing if weight.startswith(prefix) and ".pooler." not in weight]
    if new_head and not body:
        if missing:
            warnings.warn(
                f"{str(name)!r} gets a new head as {kind} ({_some(missing)}), which is trained first", stacklevel=3
            )
        return
    raise ModelError(
        f"{str(name)!r} is not a complete {kind}: its checkpoint {' and '.join(texts)}; pass the --task of the model, "
        "or a checkpoint that was saved with its head"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more weights" if len(names) > 2 else "")


# Tokenizers and processors


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
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made of a configuration alone
        raise ModelError(f"the tokenizer of {str(name)!r} has no vocabulary: its files are missing; save it there")
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
        kind = architecture(AutoConfig.from_pretrained(name))
        has_head = "For" in kind or "LMHead" in kind
        model_class: Any = getattr(transformers, kind, None) if has_head else None
        with loaded_whole():
            load = (model_class or AutoModelForCausalLM).from_pretrained
            model, info = load(name, dtype=torch.float32, output_loading_info=True)
        check_loaded(name, model, info)
        return model, processing_class or AutoProcessor.from_pretrained(name)


def _auto_class(task: Task) -> Any:
    if task not in MODELS:
        raise SettingsError(f"unknown task {task!r}; {suggestion(str(task), list(MODELS))}")
    return MODELS[task]


@contextmanager
def _loading(what: str, name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what transformers raises if something does not exist or cannot be read into a `ModelError`."""
    try:
        yield
    except UnlearningError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: weights of other sizes
        reason = "there is no such folder" if _is_missing_path(str(name)) else one_line(error)
        raise ModelError(f"cannot load {what} {str(name)!r}: {reason}") from error
