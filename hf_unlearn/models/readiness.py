"""Checks of a model before any work is done with it: its weights are in memory, its adapters add nothing, it can be
saved."""

import tempfile
from collections.abc import Callable

from torch import nn

from hf_unlearn.errors import ModelError
from hf_unlearn.models.adapters import changed_adapter, without_wrapper


def check_loaded(model: nn.Module) -> None:
    """Raise `ModelError` if weights are not in memory: on the meta device, where offloading keeps them between uses.

    >>> import torch
    >>> check_loaded(nn.Linear(2, 2))
    >>> check_loaded(nn.Linear(2, 2, device="meta"))
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.ModelError: 2 weights of Linear are not in memory (the first is weight); load it without ...
    """
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    absent += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if not absent:
        return
    places = getattr(model, "hf_device_map", None) or {}
    offloaded = sorted({str(place) for place in places.values() if place in ("disk", "cpu")})
    where = f": device_map offloads modules to {' and '.join(offloaded)}" if offloaded else ""
    raise ModelError(
        f"{len(absent)} weights of {type(model).__name__} are not in memory (the first is {absent[0]}{where}); load it "
        "without device_map on a device that holds all of it, or on the CPU"
    )


def check_base_model(model: nn.Module) -> None:
    """Raise `ModelError` if an active adapter changes what the base weights compute.

    The fingerprint of the weights leaves adapters out: what is measured through such an adapter would pass for a
    measurement of the base model.
    """
    if (name := changed_adapter(model)) is not None:
        raise ModelError(
            f"the adapter of {name} has been trained, so that the model is no longer that of its base weights; merge "
            "it (merge_and_unload), or disable it (with model.disable_adapter()) to use the base model"
        )


def check_saveable(model: nn.Module, processing_class: object = None) -> None:
    """Raise `ModelError` if what is saved next to the weights cannot be written: found before a run and not after it.

    transformers reads some configurations that it refuses to write, such as a generation configuration with a
    temperature and without do_sample.
    """
    inner = without_wrapper(model)
    parts: dict[str, object] = {
        "configuration": getattr(inner, "config", None),
        "generation_config": getattr(inner, "generation_config", None) if _generates(inner) else None,
        "tokenizer or processor": processing_class,
    }
    for what, part in parts.items():
        save: Callable[[str], object] | None = getattr(part, "save_pretrained", None)
        if save is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                save(folder)
            except (ValueError, TypeError, OSError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise ModelError(
                    f"the {what} of {type(inner).__name__} cannot be saved ({reason[:300]}); correct it before the run"
                ) from error


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate())
