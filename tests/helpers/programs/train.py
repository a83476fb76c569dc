"""What each process of the tests here runs: collect, unlearn, score; process 0 writes what it found to a folder."""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from helpers.tiny import text_rows, tiny_gpt2, tiny_llama
from helpers.training import RETAIN, logits
from hf_unlearn.core.processes import gather, leave, wait_for_all
from hf_unlearn.core.sharding import local_part, whole
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import StatisticsError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

TWELVE = text_rows(12, seed=2)
ROWS = TWELVE + text_rows(1, seed=4)  # thirteen: uneven over two and three processes, in rows and in batches


def _deepspeed(stage: int) -> dict[str, Any]:
    zero = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {**dict.fromkeys(names, "auto"), "zero_optimization": zero}}


MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "zero1": _deepspeed(1),
    "zero2": _deepspeed(2),
    "zero3": _deepspeed(3),
}
SKETCH: dict[str, Any] = {"sketch_above": 40, "sketch_rank": 20}  # of down_proj, and of the Fishers of gate and up
# Each run: the model, and settings under which a step is anything but a multiple of the gradient.
RUNS: dict[str, dict[str, Any]] = {
    "shards": {"constraint": "kronecker", "keep_statistics_on": "shards"},
    "sketch": {"constraint": "kronecker", "keep_statistics_on": "shards", **SKETCH},
    "kronecker": {"constraint": "kronecker", "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2},
    "conv1d": {"model": tiny_gpt2, "constraint": "kronecker"},
    "row by row": {"constraint": "kronecker", "forget_target": 3.4},  # half of the rows have reached this loss
    "signature": {
        "constraint_settings": {"energy": 1.0},
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "learning_rate": 5e-3,
        "relative_step": False,
        "gradient_accumulation_steps": 2,
        "npo": True,
    },
    "signature, conv1d": {"model": tiny_gpt2, "constraint_settings": {"energy": 1.0}, "learning_rate": 1e-2},
    "bf16": {"constraint_settings": {"energy": 1.0}, "learning_rate": 1e-2, "bf16": True},
    "lora": {
        "constraint_settings": {"energy": 1.0},
        "learning_rate": 1e-2,
        "peft": LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    },
}


def settings(folder: Path, mode: str, processes: int, **changes: Any) -> UnlearningConfig:
    on_cpu = torch.cuda.device_count() < processes  # else every process has a GPU of its own
    few = {"use_cpu": on_cpu, "disable_tqdm": True, "max_steps": 4, "seed": 0, "learning_rate": 2e-3, "ddp_timeout": 60}
    few["constraint"] = "energy"
    batch = 12 // processes // changes.get("gradient_accumulation_steps", 1)
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "eval_strategy": "no"}
    return UnlearningConfig(str(folder), **{**few, **sizes, "forget_metric": "loss", **MODES[mode], **changes})


def unlearn(name: str, folder: Path, mode: str, processes: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One run: what it found, and all its weights by name."""
    own = dict(RUNS[name])
    model, peft = own.pop("model", tiny_llama)(), own.pop("peft", None)
    if own.pop("npo", False):
        own["loss"] = "npo"  # reads the original model's predictions
    args = settings(folder, mode, processes, **own)
    model.to(args.device)
    fisher = own.get("constraint") == "kronecker"
    sketch = {name: own[name] for name in SKETCH if name in own}
    statistics = collect_statistics(model, ROWS if fisher else RETAIN, fisher=fisher, progress=False, **sketch)
    before = logits(model, RETAIN), logits(model, TWELVE)
    trainer = UnlearningTrainer(
        model, args, TWELVE, statistics=statistics, eval_dataset={"forget": TWELVE, "rows": ROWS}, peft_config=peft
    )
    trainer.train()
    after = logits(trainer.model, RETAIN), logits(trainer.model, TWELVE)
    with trainer.original_model() as original:
        back = (logits(original, TWELVE) - before[1]).abs().max().item()
    retain, forget = ((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    scores = score_rows(trainer.model, ROWS, PaddingCollator(), batch_size=2)
    trained: list[Any] = [p for p in trainer.model.parameters() if p.requires_grad]
    lines = trainer.state.log_history
    found = {
        "retain": retain,
        "forget": forget,
        "back": back,
        "scale": before[0].abs().max().item(),
        "loss": scores.loss.tolist(),
        "steps": trainer.state.global_step,
        "drift": trainer.constrainer.drift().relative,
        "kl": trainer.constrainer.drift().kl,
        "leak": trainer.constrainer.leak,
        "evaluation": [line["eval_rows_loss"] for line in lines if "eval_rows_loss" in line][-1:],
        "placements": sorted({type(part.layout).__name__ for part in trainer.constrainer.weights}),
        "dtensors": all(isinstance(p, DTensor) for p in trained),
        "held": sum(part.anchor.numel() for part in trainer.constrainer.weights) / sum(map(_size, trained)),
    }
    state = trainer.whole_state_dict() or trainer.model.state_dict()
    moved = {k: v for k, v in state.items() if "lm_head" not in k and ("lora_" in k or peft is None)}
    trainer.save_model()
    return found, {k: v.detach().clone().contiguous() for k, v in moved.items()}


def _size(parameter: Any) -> int:
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def main(folder: Path, processes: int, modes: list[str]) -> None:
    for mode in modes:
        forget_mode()
        (folder / mode).mkdir(parents=True, exist_ok=True)
        args = settings(folder / mode / "scratch", mode, processes)
        assert args.world_size == processes == (dist.get_world_size() if dist.is_initialized() else 1)
        found, tensors = collected(args, folder) if mode == "ddp" else ({"processes": args.world_size}, {})
        for name in RUNS:
            found[name], weights = unlearn(name, folder / mode / name, mode, processes)
            tensors |= {f"{name}/{k}": v for k, v in weights.items()}
        if args.process_index == 0:
            save_file(tensors, folder / mode / "found.safetensors")
            (folder / mode / "found.json").write_text(json.dumps(found))
        wait_for_all()


def forget_mode() -> None:
    """Let one program run under several modes: accelerate's state is the process's, and outlives a Trainer."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def collected(args: UnlearningConfig, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Statistics of rows that do not divide by the processes, and of fewer rows than processes."""
    model = tiny_llama().to(args.device)
    statistics = collect_statistics(model, ROWS, fisher=True, batch_size=2, progress=False)
    one = collect_statistics(model, ROWS[:1], fisher=True, progress=False)
    found = {
        "processes": args.world_size,
        "counts": [statistics.rows, statistics.labels, dict(statistics.positions), one.rows, one.labels],
        "data": [statistics.data, one.data],
        "refused": _refused(args, statistics, one),
        "same": len(set(gather(sum(float(v.abs().sum()) for v in statistics.gram_sums.values())))) == 1,
    }
    statistics.decompose(statistics.layers)
    # row by row, so that activations are the same whoever computes them; and summed in shards, on sharded weights
    by_row = collect_statistics(model, ROWS, fisher=True, batch_size=1, progress=False)
    shards = collect_statistics(model, ROWS, fisher=True, batch_size=1, keep_on="shards", progress=False)
    held = sum(v.numel() for v in map(local_part, shards.gram_sums.values()))
    sketched = collect_statistics(model, ROWS, fisher=True, batch_size=1, progress=False, **SKETCH)
    sketched_shards = collect_statistics(
        model, ROWS, fisher=True, batch_size=1, keep_on="shards", progress=False, **SKETCH
    )
    sample = collect_statistics(model, TWELVE * 8, batch_size=1, tolerance=0.1, progress=False)
    found["sample"] = [sample.rows, len(set(gather((sample.rows, sample.data, sample.settings["change"]))))]
    found["share"] = held / sum(v.numel() for v in by_row.gram_sums.values())
    found["same data"] = [by_row.data == statistics.data == shards.data, by_row.positions == dict(shards.positions)]
    if dist.is_initialized():
        fully_shard(model)
    cut = collect_statistics(model, ROWS, fisher=True, batch_size=1, keep_on="shards", progress=False)
    found["weights"] = [by_row.weights, shards.weights, cut.weights]
    found["gradients"] = sum(p.grad is not None for p in model.parameters())
    tensors = {f"gram.{k}": v for k, v in statistics.gram_sums.items()}
    tensors |= {f"fisher.{k}": v for k, v in statistics.fisher_sums.items()}
    tensors |= {f"one.{k}": v for k, v in one.gram_sums.items()}
    for name, kept in (
        ("by_row", by_row),
        ("shards", shards),
        ("cut", cut),
        ("less", shards - shards.kept_on("device")),
        ("sketched", sketched),
        ("sketched_shards", sketched_shards),
    ):
        tensors |= {f"{name}.gram.{k}": whole(v) for k, v in kept.gram_sums.items()}
        tensors |= {f"{name}.fisher.{k}": whole(v) for k, v in kept.fisher_sums.items()}
    for kept in (shards, sketched, sketched_shards):
        kept.decompose(kept.layers)
    for name, kept in (("sketched", sketched), ("sketched_shards", sketched_shards)):
        parts = {k: kept.gram_eigen(k) for k in kept.gram_sums}
        tensors |= {f"{name}.values.{k}": v.values_I for k, v in parts.items()}
        tensors |= {f"{name}.missed.{k}": v.missed for k, v in parts.items() if v.missed is not None}
    tensors |= {f"shards.vectors.{k}": whole(shards.gram_eigen(k).vectors_II) for k in shards.gram_sums}
    again = RetainStatistics.from_pretrained(shards.save_pretrained(folder / "shards"), model=None)
    tensors |= {f"saved.gram.{k}": v for k, v in again.gram_sums.items()}
    tensors |= {f"values.{k}": statistics.gram_eigen(k).values_I for k in statistics.gram_sums}
    return found, {k: v.contiguous().clone() for k, v in tensors.items()}


def _refused(args: UnlearningConfig, whole: RetainStatistics, one: RetainStatistics) -> str:
    """What processes say that were given different statistics; a hang would say nothing."""
    try:
        UnlearningTrainer(tiny_llama().to(args.device), args, TWELVE, statistics=one if args.process_index else whole)
    except StatisticsError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280, exit=True)  # a hang says where
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    leave()
