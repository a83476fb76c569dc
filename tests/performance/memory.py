"""Print the peak memory (Linux) in MB above the interpreter: `memory.py plain|collect|CONSTRAINT WIDTH LAYERS`."""

import sys
from pathlib import Path

import torch
from bench import batches, llama, rows_of

from hf_unlearn import build_constraint, collect_statistics, constrain_optimizer, freeze_unprotected


def peak() -> float:
    """Largest resident memory of this program so far, in MB (`ru_maxrss` would count its parent's)."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main(work: str, width: int, layers: int) -> None:
    before, model = peak(), llama(width, layers)
    if work == "collect":
        collect_statistics(model, rows_of(8), batch_size=4, progress=False)
        print(peak() - before)
        return
    names = dict.fromkeys(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    freeze_unprotected(model, names) if work == "plain" else None
    if work != "plain":
        retain = collect_statistics(model, rows_of(8), fisher=work == "kronecker", batch_size=4, progress=False)
        freeze_unprotected(model, retain.layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)
    if work != "plain":
        constrain_optimizer(optimizer, model, retain, build_constraint(work))
    for _ in range(2):
        model(**batches(rows_of(4), 4)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
