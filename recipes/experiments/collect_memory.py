"""Measure the memory that collecting statistics takes on top of the model.

    python recipes/experiments/collect_memory.py MODEL DATASET --max_memory 50MB

Prints the peak of the private memory of the process, sampled every 50 ms, on the first four TOFU rows.
"""

import argparse
import sys
import threading
import time

import psutil

from hf_unlearn import UnlearningError, collect_statistics
from hf_unlearn.data import load_rows
from hf_unlearn.models import load_model, load_processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--max_memory")
    parser.add_argument("--keep_on", default="device")
    args = parser.parse_args()
    try:
        task = "language-model"
        model, tokenizer = load_model(args.model, task), load_processor(args.model, task)
        rows = load_rows(args.dataset, "full[0:4]", "rows")
        process, done, peak = psutil.Process(), threading.Event(), [0]
        before, start = process.memory_full_info().uss, time.perf_counter()

        def watch() -> None:
            while not done.wait(0.05):
                peak[0] = max(peak[0], process.memory_full_info().uss - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        statistics = collect_statistics(
            model,
            rows,
            processing_class=tokenizer,
            batch_size=2,
            keep_on=args.keep_on,
            max_memory=args.max_memory,
            progress=False,
        )
        done.set()
        watcher.join()
    except UnlearningError as error:
        print(f"collect_memory.py: {error}", file=sys.stderr)
        return 2
    sums = sum(gram.numel() * gram.element_size() for gram in statistics.gram_sums.values())
    seconds = time.perf_counter() - start
    print(f"Grams {sums / 1e6:.0f} MB, peak above the model {peak[0] / 1e6:.0f} MB, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
