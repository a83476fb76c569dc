"""What each process of `test_ddp.py` runs: collect, unlearn, score; process 0 writes what it found to a folder."""

import faulthandler
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import tiny_llama
from test_trainer import FORGET, HOLDOUT

from hf_unlearn.collect import collect_statistics
from hf_unlearn.config import UnlearningConfig
from hf_unlearn.data import PaddingCollator
from hf_unlearn.errors import StatisticsError
from hf_unlearn.metrics import score_rows
from hf_unlearn.sharding import leave
from hf_unlearn.statistics import RetainStatistics
from hf_unlearn.trainer import UnlearningTrainer

SIX = FORGET + HOLDOUT[:2]
ROWS = SIX + HOLDOUT[2:3]  # seven: uneven over two and three processes, in rows and in batches


def main(folder: Path, processes: int) -> None:
    args = UnlearningConfig(
        str(folder / "scratch"), use_cpu=True, disable_tqdm=True, max_steps=4, seed=0, learning_rate=1e-2,
        per_device_train_batch_size=6 // processes, per_device_eval_batch_size=2, constraint="kronecker",
        forget_metric="loss", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    assert args.world_size == processes == (dist.get_world_size() if dist.is_initialized() else 1)
    model = tiny_llama()
    statistics = collect_statistics(model, ROWS, fisher=True, batch_size=2, progress=False)
    one = collect_statistics(model, ROWS[:1], fisher=True, progress=False)  # fewer rows than processes
    trainer = UnlearningTrainer(model, args, SIX, statistics=statistics, eval_dataset={"forget": SIX, "rows": ROWS})
    trainer.train()
    scores = score_rows(model, ROWS, PaddingCollator(), batch_size=2)
    found = {
        "processes": args.world_size,
        "counts": [statistics.rows, statistics.labels, dict(statistics.positions), one.rows, one.labels],
        "data": [statistics.data, one.data],
        "loss": scores.loss.tolist(),
        "evaluation": [line for line in trainer.state.log_history if "eval_rows_loss" in line][-1]["eval_rows_loss"],
        "steps": trainer.state.global_step,
        "drift": trainer.constrainer.drift().relative,
        "refused": _refused(args, statistics, one),
        "same": len(set(_everywhere(float(sum(p.double().abs().sum() for p in model.parameters()))))) == 1,
    }
    if args.process_index == 0:
        tensors = {f"gram.{k}": v for k, v in statistics.gram_sums.items()}
        tensors |= {f"fisher.{k}": v for k, v in statistics.fisher_sums.items()}
        tensors |= {f"one.{k}": v for k, v in one.gram_sums.items()}
        tensors |= {f"values.{k}": statistics.gram_eigen(k).values_I for k in statistics.gram_sums}
        tensors |= {f"weight.{k}": v.detach() for k, v in model.named_parameters()}
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "found.safetensors")
        (folder / "found.json").write_text(json.dumps(found))


def _refused(args: UnlearningConfig, whole: RetainStatistics, one: RetainStatistics) -> str:
    """What processes say that were given different statistics; a hang would say nothing."""
    try:
        UnlearningTrainer(tiny_llama(), args, SIX, statistics=one if args.process_index else whole)
    except StatisticsError as error:
        return str(error)
    return ""


def _everywhere(value: float) -> list[float]:
    if not dist.is_initialized():
        return [value]
    found = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor(value, dtype=torch.float64))
    return [v.item() for v in found]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(90, exit=True)  # a hang says where
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
