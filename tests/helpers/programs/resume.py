"""What each process of `test_resuming.py` runs: a run to its end, and the same resumed from one of its checkpoints."""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.programs.train import forget_mode, settings
from helpers.tiny import tiny_llama
from helpers.training import FORGET, HOLDOUT
from hf_unlearn.core.processes import gather, leave
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.trainer import UnlearningTrainer

CASES: dict[str, dict[str, Any]] = {
    "kronecker": {"constraint": "kronecker", "max_steps": 7, "gradient_accumulation_steps": 2},
    "adamw": {"constraint_settings": {"energy": 0.9}, "optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 7},
    # the stretch that is shortened begins before the checkpoint: its start travels with it
    "stopping": {
        "loss": "grad_ascent",
        "constraint": "none",
        "learning_rate": 4e-3,
        "max_steps": 40,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 2,
    },
}


def make(folder: Path, mode: str, processes: int, case: str) -> UnlearningTrainer:
    own = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None, **CASES[case]}
    args = settings(folder, mode, processes, **own)
    args.per_device_train_batch_size = max(1, 4 // processes)
    model = tiny_llama()
    statistics = collect_statistics(model, HOLDOUT, fisher=True, progress=False)
    return UnlearningTrainer(
        model, args, FORGET, statistics=statistics, holdout_dataset=HOLDOUT if case == "stopping" else None
    )


def weights(trainer: UnlearningTrainer) -> list[torch.Tensor]:
    return trainer.constrainer.copy_weights()


def compare(folder: Path, mode: str, processes: int, case: str) -> dict[str, Any]:
    whole = make(folder, mode, processes, case)
    whole.train()
    end = whole.state.global_step
    checkpoint = 3 if case != "stopping" else max(step for step in range(0, end, 2) if step % 4)
    again = make(folder, mode, processes, case)
    start = weights(again)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    wanted, found = weights(whole), weights(again)
    equal = all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    moved = any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(start, wanted, strict=True))
    if case == "stopping":  # the newest checkpoint is that of the stop itself
        stopped = make(folder, mode, processes, case)
        stopped.train(resume_from_checkpoint=True)
        taken_up = all(torch.equal(a, b) for a, b in zip(wanted, weights(stopped), strict=True))
        equal = equal and taken_up and stopped.stop_reason == whole.stop_reason
    return {
        "equal": gather(equal),
        "moved": moved,
        "steps": [end, again.state.global_step],
        "checkpoint": checkpoint,
        "reasons": [whole.stop_reason, again.stop_reason],
        "drift": [t.constrainer.drift().relative for t in (whole, again)],
        "files": sorted(p.name for p in (folder / f"checkpoint-{checkpoint}").iterdir()),
    }


def main(folder: Path, processes: int, modes: list[str]) -> None:
    for mode in modes:
        forget_mode()
        found = {case: compare(folder / mode / case, mode, processes, case) for case in CASES}
        (folder / f"{mode}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280, exit=True)  # a hang says where
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    leave()
