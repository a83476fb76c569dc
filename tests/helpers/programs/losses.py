"""What each process of `test_losses_ddp.py` runs: losses with counts of two kinds, a dual weight, outputs on disk, a
stream; process 0 writes what it found to a folder."""

import json
import sys
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file

from helpers.tiny import text_rows, tiny_llama
from hf_unlearn.core.processes import leave
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

FORGET = [{**row, "alternate": other} for row, other in zip(text_rows(6, seed=2), text_rows(6, seed=7), strict=True)]
RETAIN = text_rows(7, seed=1)
RUNS = {
    "pdu": ({"eps": 0.1, "eta": 0.5, "warmup_epochs": 0, "alpha": 2.0}, False),
    "dpo": ({"retain": "kl"}, True),
    "rmu": ({"layer": 0}, False),
    "simnpo": ({}, False),
}


def main(folder: Path, processes: int) -> None:
    found, tensors = {}, {}
    for loss, (own, on_disk) in RUNS.items():
        args = UnlearningConfig(
            str(folder / "scratch"),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=3,
            seed=0,
            learning_rate=1e-2,
            per_device_train_batch_size=6 // processes,
            per_device_eval_batch_size=2,
            constraint="none",
            loss=loss,
            loss_settings=own,
            original_logprobs=str(folder / f"{loss}.outputs") if on_disk else None,
        )
        model = tiny_llama()
        trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
        trainer.train()
        found[loss] = {
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "weight": trainer.loss.dual.value if trainer.loss.dual else None,
        }
        tensors |= {f"{loss}.{name}": p.detach().clone() for name, p in model.named_parameters()}
    stream = datasets.Dataset.from_list(text_rows(5)).to_iterable_dataset()
    statistics = collect_statistics(tiny_llama(), stream, batch_size=2, progress=False)
    found["stream"] = {"rows": statistics.rows, "data": statistics.data}
    tensors |= {f"stream.{name}": gram for name, gram in statistics.gram_sums.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "found.safetensors")
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
