"""A run that `test_resume.py` kills and starts again: the same command each time, to the end."""

import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from helpers.tiny import tiny_llama
from helpers.training import FORGET, RETAIN
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer


class Slowly(TrainerCallback):
    """Stretches the run, so that a kill falls into it."""

    def on_step_end(self, *args: Any, **options: Any) -> None:
        time.sleep(0.05)


def main(folder: Path) -> None:
    model = tiny_llama()
    if not (folder / "statistics").is_dir():
        collect_statistics(model, RETAIN, fisher=True, progress=False).save_pretrained(folder / "statistics")
    args = UnlearningConfig(
        str(folder / "run"),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=12,
        seed=0,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        constraint="kronecker",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    statistics = RetainStatistics.from_pretrained(folder / "statistics", model=model)
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, callbacks=[Slowly()])
    print("ready", flush=True)
    trainer.train(resume_from_checkpoint=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}, folder / "end.part")
    (folder / "end.part").rename(folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
