"""Peaks of one small request, measured: `python measured.py NAME CONSTRAINT`, a JSON object of bytes on the last line.

Run by `test_estimate` in a process of its own: resident memory above what it was before the model was made, the
kernel's high-water mark being set back (`/proc/self/clear_refs`) before each phase.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, ViTConfig

from hf_unlearn import UnlearningConfig, UnlearningTrainer, collect_statistics
from hf_unlearn.models.loading import MODELS

ROWS, LENGTH, BATCH = 24, 64, 4  # more positions than half of the widest layer: what is estimated is decomposed in full
COMMON: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 640}
BIG: dict[str, tuple[Any, str]] = {
    "llama": (LlamaConfig(vocab_size=2000, intermediate_size=1792, num_key_value_heads=4, **COMMON), "language-model"),
    "gpt2": (GPT2Config(vocab_size=2000, n_embd=640, n_layer=3, n_head=8), "language-model"),
    "bert": (BertConfig(vocab_size=2000, intermediate_size=2048, **COMMON), "text-classification"),
    "vit": (ViTConfig(image_size=64, patch_size=8, intermediate_size=2048, **COMMON), "image-classification"),
}


def rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return [{"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": i % 2} for i in range(count)]
    found = []
    for index in range(count):
        tokens = torch.randint(3, 2000, (LENGTH,), generator=generator).tolist()
        found.append({"input_ids": tokens, "attention_mask": [1] * LENGTH})
        found[-1]["labels"] = index % 2 if name == "bert" else tokens  # type: ignore[assignment]
    return found


def resident(mark: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def warm_up(name: str, out: str) -> None:
    """Load every library and start every thread pool: the whole request on a model too small to be seen."""
    config = BIG[name][0].to_dict()
    sizes = {"hidden_size", "n_embd"} & set(config)
    small = type(BIG[name][0])(
        **{**config, **dict.fromkeys(sizes, 16), "intermediate_size": 16, "head_dim": 2, "num_key_value_heads": 4}
    )
    request(name, small, "kronecker", "sgd", out)


def request(name: str, config: Any, constraint: str, optim: str, out: str) -> dict[str, int]:
    base, found = resident("VmRSS"), {}
    torch.manual_seed(0)
    model = MODELS[BIG[name][1]].from_config(config).eval()
    found["load"] = resident("VmRSS") - base
    retain, forget = rows(name, ROWS, 0), rows(name, BATCH, 1)
    reset_peak()
    fisher = constraint == "kronecker"
    statistics = collect_statistics(model, retain, batch_size=BATCH, fisher=fisher, progress=False)
    found["collect"] = resident("VmHWM") - base
    args = UnlearningConfig(
        out,
        constraint=constraint,
        max_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        optim=optim,
        eval_strategy="no",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        dataloader_pin_memory=False,
        logging_strategy="no",
        forget_target=0.0,  # which no row reaches: a step is on all of them
    )
    reset_peak()
    trainer = UnlearningTrainer(model, args, forget, statistics=statistics, holdout_dataset=rows(name, BATCH, 2))
    found["decompose"] = resident("VmHWM") - base
    reset_peak()
    trainer.train()
    found["train"] = resident("VmHWM") - base
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(sys.argv[1], folder)
        print(json.dumps(request(sys.argv[1], BIG[sys.argv[1]][0], sys.argv[2], sys.argv[3], folder)))
