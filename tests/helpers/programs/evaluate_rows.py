"""What each process of `test_judged.py` runs: every kind of measure on whole and on sharded (FSDP2) models."""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.questions import letters, questions
from helpers.tiny import sharpen, tiny_llama
from hf_unlearn.core.processes import leave
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import ModelError
from hf_unlearn.evaluation.attacks.auditing import AuditSettings, audit
from hf_unlearn.evaluation.evaluate import evaluate_unlearning

FORGET, HOLDOUT = encode_dataset(questions(7), letters()), encode_dataset(questions(5, 1), letters())
NAMES = ["loss", "rouge_l", "truth_ratio", "membership_auc_min_k_plus_plus", "forget_quality"]
CONTENT = ["content_loss", "function_loss", "greedy_reveals"]


def judged(model: torch.nn.Module, names: list[str], cache: Path | None, original: Any = None) -> list[list[Any]]:
    report = evaluate_unlearning(
        model,
        {"forget": FORGET, "holdout": HOLDOUT},
        original=original,
        metrics=names,
        batch_size=2,
        retrained=tiny_llama(1),
        processing_class=letters(),
        cache_dir=cache,
    )
    return [[m.name, m.split, m.model, m.n, m.value] for m in report.metrics]


def sharded(processes: int) -> Any:
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refused(model: torch.nn.Module) -> list[str]:
    """What is said where a process has not all of a gradient; a mean over processes' rows would be a wrong number."""
    said = []
    for attempt in (
        lambda: judged(model, ["membership_auc_gradient_norm"], None),
        lambda: audit(model, {"forget": FORGET}, attacks=["relearning"]),
    ):
        try:
            attempt()
        except ModelError as error:
            said.append(str(error))
    return said


def main(folder: Path, processes: int) -> None:
    PartialState(cpu=True)
    assert processes == (dist.get_world_size() if dist.is_initialized() else 1)
    whole = tiny_llama()
    found: dict[str, Any] = {"whole": judged(whole, [*NAMES, "membership_auc_gradient_norm"], folder / "cache")}
    found["cached"] = judged(whole, [*NAMES, "membership_auc_gradient_norm"], folder / "cache")
    found["content"] = judged(whole, CONTENT, None, sharpen(tiny_llama(3), 2.0))
    settings = AuditSettings(relearn_steps=2, relearn_learning_rate=1e-2)
    report = audit(
        whole,
        {"forget": FORGET, "holdout": HOLDOUT},
        original=whole,
        retrained=tiny_llama(1),
        settings=settings,
        processing_class=letters(),
        batch_size=2,
    )
    found["audit"] = [[m.name, m.split, m.model, m.n, m.value] for m in report.metrics]
    if processes > 1:
        model = sharded(processes)
        found["sharded content"] = judged(model, CONTENT, None, sharpen(tiny_llama(3), 2.0))
        found["sharded"], found["refused"] = judged(model, NAMES, folder / "other"), refused(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        found["files"] = len(list((folder / "cache").iterdir()))
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # a hang says where
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
