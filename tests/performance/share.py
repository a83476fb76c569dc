"""Print the seconds of collecting when processes share the rows: `torchrun ... share.py WIDTH LAYERS`."""

import os
import sys
import time

import torch
from accelerate import PartialState
from bench import llama, rows_of

from hf_unlearn import collect_statistics
from hf_unlearn.core.processes import is_main, leave, wait_for_all


def main(width: int, layers: int) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    model, rows = llama(width, layers), rows_of(16)
    collect_statistics(model, rows[:2], batch_size=1, progress=False)
    wait_for_all()
    start = time.perf_counter()
    collect_statistics(model, rows, batch_size=4, progress=False)
    wait_for_all()
    if is_main():
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(int(sys.argv[1]), int(sys.argv[2]))
    leave()
