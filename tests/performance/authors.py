"""Compare the CPU seconds that the PGU authors' code and hf_unlearn take for the statistics of a request.

    python tests/performance/authors.py CODE --net allcnn
    python tests/performance/authors.py CODE --net smallvgg   # minutes: theirs decomposes an 8192 x 8192 Gram twice

`CODE` is a checkout of github.com/hnanhtuan/projected_gradient_unlearning. Both sides use the same net and images.
Theirs calls `compute_svd` on the full set once, and `compute_retain_svd` at a request. Ours calls `collect_statistics`
once; at a request it collects on the forget rows, subtracts, and decomposes to bind the constraint. Each side runs in
its own process, one after the other. CPU seconds of all threads are counted: with OMP_NUM_THREADS=1 other work on the
machine does not change them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
BATCH = 125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path)
    parser.add_argument("--net", choices=["allcnn", "smallvgg"], default="allcnn")
    parser.add_argument("--full", type=int, default=1000, help="images of the full set")
    parser.add_argument("--forget", type=int, default=250, help="number of forgotten images")
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds; the median is reported")
    parser.add_argument("--side", choices=["theirs", "ours"], help="time only this side, in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps((theirs if args.side == "theirs" else ours)(args)))
        return
    times: dict[str, list[list[float]]] = {"theirs": [], "ours": []}
    for _ in range(args.rounds):
        for side, measured in times.items():
            program = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(program, capture_output=True, text=True, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    once, request = ({s: sorted(row[k] for row in rows)[len(rows) // 2] for s, rows in times.items()} for k in (0, 1))
    print(f"| {args.net}, {args.full} images, {args.forget} forgotten | theirs, s | ours, s | ratio |")
    print("|---|---:|---:|---:|")
    both = {side: once[side] + request[side] for side in times}
    for label, seconds in (("full set, once", once), ("request", request), ("together", both)):
        print(
            f"| {label} | {seconds['theirs']:.2f} | {seconds['ours']:.2f} | {seconds['theirs'] / seconds['ours']:.1f} |"
        )


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def theirs(args: argparse.Namespace) -> tuple[float, float]:
    sys.path.insert(0, str(HERE.parent))
    from helpers.authors_code import install

    install(args.code.resolve())
    import backbone
    from utils.unlearn_utils import compute_retain_svd, compute_svd

    model = seeded({"allcnn": backbone.AllCNN, "smallvgg": backbone.SmallVGG}[args.net])
    batches = [(part, torch.zeros(len(part))) for part in images_of(args.full).split(BATCH)]
    forget = batches[: args.forget // BATCH]
    once, full = clock(lambda: compute_svd(model, batches))
    request, _ = clock(lambda: compute_retain_svd(full, model, forget))
    return once, request


def ours(args: argparse.Namespace) -> tuple[float, float]:
    sys.path[:0] = [str(HERE.parents[1] / "recipes" / "experiments"), str(HERE.parents[1])]
    from seed_nets import NETS

    from hf_unlearn import EnergyConstraint, PaddingCollator, bind_constraints, collect_statistics

    model = seeded(NETS[args.net])
    rows = [{"pixel_values": image, "labels": 0} for image in images_of(args.full)]

    def collect(part: list[dict[str, Any]]) -> Any:
        return collect_statistics(model, part, collator=PaddingCollator(), batch_size=BATCH, progress=False)

    once, full = clock(lambda: collect(rows))
    constraint = EnergyConstraint(0.95, "singular_values")
    request, _ = clock(lambda: bind_constraints(full - collect(rows[: args.forget]), constraint))
    return once, request


if __name__ == "__main__":
    main()
