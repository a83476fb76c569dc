"""What each process of `test_relearning_ddp.py` runs: unlearning against an attacker of its own, and row by row."""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

from helpers.tiny import text_rows, tiny_llama
from hf_unlearn.core.processes import gather, leave
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer


def main(folder: Path) -> None:
    sharded = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    common = {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "adversary_steps": 2,
        "adversary_learning_rate": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "forget_target": 0.0,
        "ddp_timeout": 60,
    }
    model = tiny_llama()
    before = weights_fingerprint(model)
    statistics = collect_statistics(model, text_rows(2, seed=1), progress=False)
    args = UnlearningConfig(str(folder / "run"), **common, per_device_train_batch_size=6)
    trainer = UnlearningTrainer(model, args, text_rows(12, seed=2), statistics=statistics)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_forget_relearned_probability" in log]
    found = {"weights": gather(weights_fingerprint(model)), "before": before, "judged": gather(logs[-1])}
    model = tiny_llama()
    held = {k: v for k, v in common.items() if k != "forget_target"}
    args = UnlearningConfig(str(folder / "run"), **held, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    rows, holdout = text_rows(12, seed=2), text_rows(4, seed=3)
    trainer = UnlearningTrainer(model, args, rows, statistics=statistics, holdout_dataset=holdout)
    trainer.set_stopping_rows(rows, 0.9)  # all rows are below the band: they are pulled up, and nothing is pushed
    trainer.train()
    logs = [log["eval_forget_probability"] for log in trainer.state.log_history if "eval_forget_probability" in log]
    found |= {"held": gather(weights_fingerprint(model)), "pulled": logs} | by_row(folder, statistics, holdout)
    try:
        args_sharded = UnlearningConfig(str(folder / "run"), **common, **sharded)
        UnlearningTrainer(tiny_llama(), args_sharded, text_rows(12, seed=2), statistics=statistics)
    except SettingsError as error:
        found["sharded"] = str(error)
    if args.process_index == 0:
        (folder / "attacked.json").write_text(json.dumps(found | {"processes": args.world_size}))


def by_row(folder: Path, statistics: RetainStatistics, holdout: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps on a row for each process, of which both, one or none has not reached the mark."""
    rows, found = text_rows(2, seed=2), {}
    scores = sorted(score_rows(tiny_llama(), rows, PaddingCollator()).probability)
    for name, mark in (("both", 0.0), ("one", (3 * scores[0] + scores[1]) / 4), ("none", 1.0)):
        model = tiny_llama()
        args = UnlearningConfig(
            str(folder / "run"),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=1,
            per_device_train_batch_size=1,
            ddp_timeout=60,
        )
        trainer = UnlearningTrainer(model, args, rows, statistics=statistics, holdout_dataset=holdout)
        trainer.set_stopping_rows(rows, mark)
        trainer.train()
        found[name] = gather(weights_fingerprint(model))
    return found


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    main(Path(sys.argv[1]))
    leave()
