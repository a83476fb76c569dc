"""Run the scenarios of PGU (Hoang et al., WACV 2024, section 4) on CIFAR-10 and compare with a retrained model.

    python recipes/experiments/pgu.py samples CIFAR10.npz --output_dir outputs/pgu/samples-0
    python recipes/experiments/pgu.py class CIFAR10.npz --output_dir outputs/pgu/class-0
    python recipes/experiments/pgu.py poison CIFAR10.npz --output_dir outputs/pgu/poison-0
    python recipes/experiments/pgu.py table outputs/pgu/samples-*

`samples` removes class-balanced rows in four requests, `class` removes all rows of class 0, `poison` removes a tenth of
the rows, which were trained with wrong labels. CIFAR10.npz holds uint8 `x_train [N, 32, 32, 3]`, `y_train [N]`,
`x_test` and `y_test`. At the default size a scenario takes 5 to 15 minutes on one core. The size of the paper is
`--images 50000 --width 1 --epochs 200` (100 epochs for `class`). The number of forgotten rows and the batch size of the
PGU settings are those of the paper times images / 50000, so an epoch has the same number of steps. Each settings file
is one method. All methods start from the same original model. Trained models are kept in the output folder and reused.
The script writes `results.json` and prints a Markdown table.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance
from seed_nets import NETS
from torch import nn
from transformers import set_seed

from hf_unlearn import (
    DataError,
    OutputError,
    PaddingCollator,
    RetainStatistics,
    UnlearningConfig,
    UnlearningError,
    UnlearningTrainer,
    collect_statistics,
)
from hf_unlearn.cli import setup
from hf_unlearn.core import files, provenance, text
from hf_unlearn.deletion import carry, negative_share
from hf_unlearn.evaluation import metrics
from hf_unlearn.models import weights_fingerprint

HERE = Path(__file__).parent
RESULTS = "results.json"
PAPER = 50000  # training images of CIFAR-10
WATCHED = 1000  # rows at most that a stopping rule looks at
LOWEST = -20.0  # of the authors' histograms of log-entropies


@dataclass(frozen=True)
class Images:
    """`pixels [N, C, H, W]`, `labels [N]`, and `clean [N]`: what the labels were before any was flipped."""

    pixels: NDArray
    labels: NDArray
    clean: NDArray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: NDArray | slice) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen], self.clean[chosen])

    def rows(self) -> list[dict[str, Any]]:
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(self.pixels, self.labels, strict=True)]

    def flipped(self, seed: int) -> "Images":
        """Return a copy in which every label is replaced by a random other one."""
        shift = np.random.default_rng(seed).integers(1, 10, len(self))
        return Images(self.pixels, (self.clean + shift) % 10, self.clean)


@dataclass(frozen=True)
class Scenario:
    """What is forgotten, on which net, and by which settings.

    Attributes:
        requests: `(training set, share of the paper's size) -> indices of each request`.
        poisoned: The forget rows' labels are flipped before training.
        watched: What `max_retain_drop` looks at: `train` or `holdout`.
        shadows: Pairs of shadow models for the membership attack.
    """

    net: str
    settings: tuple[str, ...]
    requests: Callable[[Images, float], list[NDArray]]
    poisoned: bool = False
    watched: str = "train"
    shadows: int = 0


def balanced(train: Images, per_class: int, skip: int = 0) -> NDArray:
    """Indices of `per_class` rows of each class after the first `skip`."""
    return np.concatenate([np.flatnonzero(train.clean == c)[skip : skip + per_class] for c in range(10)])


def four_requests(train: Images, share: float) -> list[NDArray]:
    size = max(1, round(100 * share))
    return [balanced(train, size, skip=size * k) for k in range(4)]


SCENARIOS = {
    "samples": Scenario("smallvgg", ("pgu_samples", "image_rows"), four_requests, shadows=2),
    "class": Scenario("allcnn", ("pgu_class", "image_class"), lambda train, share: [np.flatnonzero(train.labels == 0)]),
    "poison": Scenario(
        "smallvgg",
        ("pgu_poison", "image_poison"),
        lambda train, share: [balanced(train, round(500 * share))],
        poisoned=True,
        watched="holdout",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, scenario in SCENARIOS.items():
        task = tasks.add_parser(name)
        task.add_argument("data", type=Path, help="CIFAR10.npz")
        task.add_argument("--output_dir", type=Path, required=True)
        task.add_argument("--settings", type=Path, nargs="+", help=f"default: {', '.join(scenario.settings)}, by name")
        task.add_argument("--net", choices=sorted(NETS), default=scenario.net)
        task.add_argument("--width", type=float, default=0.25, help="factor on the widths of its layers")
        task.add_argument("--images", type=int, default=4000, help="training images, the same number of each class")
        task.add_argument("--epochs", type=int, default=25)
        task.add_argument("--shadows", type=int, default=scenario.shadows, help="pairs of shadow models")
        task.add_argument("--seed", type=int, default=0)
    table = tasks.add_parser("table", help="Markdown table of finished runs, with mean and range over several")
    table.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        if args.task == "table":
            print(markdown([read(folder) for folder in args.folders]))
            return 0
        setup.hush(bars=False)
        train, holdout, test = load(args.data, args.images, args.seed)
        result = run(args, SCENARIOS[args.task], train, holdout, test)
        files.write_json(args.output_dir / RESULTS, result)
        print(markdown([result]))
    except UnlearningError as error:
        print(f"pgu.py: {error}", file=sys.stderr)
        return 2
    return 0


def read_arrays(path: Path) -> dict[str, NDArray]:
    """Read `x_train`, `y_train`, `x_test` and `y_test` of an npz file.

    Raises:
        DataError: The file does not exist, has another format, or lacks an array.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not an npz file with {', '.join(names)}: {error}") from error


def load(path: Path, count: int, seed: int) -> tuple[Images, Images, Images]:
    """Load `count` training images, and a tenth as many held-out and test images, all class-balanced."""
    arrays, generator = read_arrays(path), np.random.default_rng(seed)

    def part(name: str, size: int) -> Images:
        order = generator.permutation(len(arrays[f"y_{name}"]))
        labels = arrays[f"y_{name}"][order].astype(np.int64)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: size // 10] for c in range(10)]))
        pixels = arrays[f"x_{name}"][order[chosen]].transpose(0, 3, 1, 2).astype(np.float32) / 255
        mean, deviation = (np.reshape(v, (3, 1, 1)) for v in ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)))
        return Images(((pixels - mean) / deviation).astype(np.float32), labels[chosen], labels[chosen])

    train, others = part("train", count), part("test", min(2 * max(count // 10, 1000), 10000))
    return train, others[0::2], others[1::2]


# One scenario


def run(args: argparse.Namespace, scenario: Scenario, train: Images, holdout: Images, test: Images) -> dict[str, Any]:
    """Train, unlearn with every method, and compare with models trained without the rows."""
    share = len(train) / PAPER
    requests = scenario.requests(train, share)
    if scenario.poisoned:
        train.labels[requests[0]] = train[requests[0]].flipped(args.seed).labels
        holdout = holdout.flipped(args.seed)  # what rows like these look like to a model that never saw them
    gone = [np.concatenate(requests[: k + 1]) for k in range(len(requests))]
    remaining = [np.setdiff1d(np.arange(len(train)), indices) for indices in gone]
    classes = np.unique(train.clean[remaining[-1]])
    holdout, test = (part[np.isin(part.clean, classes)] for part in (holdout, test))

    def trained(name: str, rows: Images, seed: int) -> nn.Module:
        return trained_net(args.output_dir / f"{name}.safetensors", args.net, args.width, rows, args.epochs, seed)

    original = trained("original", train, args.seed)
    retrained = [trained(f"retrained-{k}", train[kept], args.seed + 100) for k, kept in enumerate(remaining, 1)]

    def shadow(saw: bool, n: int) -> nn.Module:  # of the first request alone, as in the paper
        kind, rows, seed = ("all", train, 200) if saw else ("left", train[remaining[0]], 300)
        return trained(f"shadow-{kind}-{n}", rows, args.seed + seed + n)

    shadows = [(shadow(True, n), shadow(False, n)) for n in range(args.shadows)]
    evaluations = [
        Evaluation(train[gone[k]], train[remaining[k]], test, retrained[k], shadows if k == 0 else [], args.seed)
        for k in range(len(requests))
    ]
    records = []
    for k, evaluation in enumerate(evaluations):
        records += [evaluation(original, "original", k + 1), evaluation(retrained[k], "retrained", k + 1)]
        records += [evaluation(shadow, "retrained, other seed", k + 1) for _, shadow in (shadows[:1] if k == 0 else [])]
    paths = args.settings or [HERE / f"{name}.yaml" for name in scenario.settings]
    watched = (holdout if scenario.watched == "holdout" else train[remaining[-1]])[:WATCHED]
    if scenario.poisoned:
        watched = Images(watched.pixels, watched.clean, watched.clean)
    for path in paths:
        config = settings(path, args.output_dir / path.stem, share, args.seed)
        forget_sets = [train[indices] for indices in requests]
        for k, (model, cost) in enumerate(
            unlearn(copy.deepcopy(original), config, train, forget_sets, holdout, watched)
        ):
            records.append(evaluations[k](model, path.stem, k + 1) | cost)
            print(f"{args.task}, {path.stem}, request {k + 1}: {cost['stopped'] or 'all epochs'}", flush=True)
    arguments = {k: getattr(args, k) for k in ("task", "net", "width", "images", "epochs", "seed", "shadows")}
    sizes = {"forget": len(gone[-1]), "retain": len(remaining[-1]), "holdout": len(holdout), "test": len(test)}
    return arguments | {
        "rows": sizes,
        "hardware": provenance.hardware(),
        "versions": provenance.package_versions(),
        "models": records,
    }


def settings(path: Path, folder: Path, share: float, seed: int) -> UnlearningConfig:
    """Read a settings file and scale its batch size from 50000 training images to this training set."""
    config = UnlearningConfig(
        str(folder),
        **files.read_yaml(path),
        seed=seed,
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    if config.relative_step:
        return config
    return config.but(per_device_train_batch_size=max(1, round(config.per_device_train_batch_size * share)))


def unlearn(
    model: nn.Module,
    config: UnlearningConfig,
    train: Images,
    requests: Sequence[Images],
    holdout: Images,
    watched: Images,
) -> Any:
    """Fulfil the requests one after another; yield the model and a record of its cost after each.

    The retain statistics of one request are the full statistics of the next (PGU, section 3.3). Retain rows are read
    only by the rule `max_retain_drop`.
    """
    fisher = config.constraint == "kronecker"
    start = time.perf_counter()
    full = collect(model, train, fisher)
    collecting, mark = time.perf_counter() - start, accuracy(probabilities(model, holdout), holdout.labels)
    for rows in requests:
        start = time.perf_counter()
        full = carry(full, weights_fingerprint(model)) - collect(model, rows, fisher)
        split = {"retain": watched.rows()} if config.max_retain_drop is not None else None
        by_holdout = config.forget_target is None and config.max_retain_drop is None
        trainer = UnlearningTrainer(
            model,
            config,
            rows.rows(),
            statistics=full,
            eval_dataset=split,
            data_collator=PaddingCollator(),
            holdout_dataset=holdout.rows() if by_holdout else None,
        )
        if by_holdout:
            trainer.set_stopping_rows(rows.rows(), mark)
        trainer.train()
        yield (
            model.eval(),
            {
                "seconds": time.perf_counter() - start,
                "collecting_seconds": collecting,
                "stopped": trainer.stop_reason,
                "steps": trainer.state.global_step,
                "drift": trainer.constrainer.drift().relative,
                "negative_share": negative_share(full),
            },
        )


def collect(model: nn.Module, images: Images, fisher: bool) -> RetainStatistics:
    rows = images.rows()
    return collect_statistics(model, rows, collator=PaddingCollator(), batch_size=64, fisher=fisher, progress=False)


def trained_net(path: Path, net: str, width: float, images: Images, epochs: int, seed: int) -> nn.Module:
    """Train a net from scratch, or load it (SGD and schedule of the authors, without augmentation)."""
    set_seed(seed)
    channels, size = images.pixels.shape[1:3]
    model = NETS[net](width, channels) if net == "allcnn" else NETS[net](width, channels, size=size)
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    model.to(memory_format=torch.channels_last).train()
    pixels, labels = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (0.0005 / 0.01) ** (1 / epochs))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(min(256, max(16, len(images) // 64))):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[batch].to(memory_format=torch.channels_last)), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return model.to(memory_format=torch.contiguous_format).eval()


# Evaluation


@dataclass(frozen=True)
class Evaluation:
    """Compare a model with the retrained one on the forget rows of all requests so far."""

    forget: Images
    retain: Images
    test: Images
    retrained: nn.Module
    shadows: Sequence[tuple[nn.Module, nn.Module]]
    seed: int

    def __call__(self, model: nn.Module, name: str, request: int) -> dict[str, Any]:
        forget = probabilities(model, self.forget)
        record = {
            "model": name,
            "request": request,
            "forget": accuracy(forget, self.forget.labels),
            "retain": accuracy(probabilities(model, self.retain), self.retain.labels),
            "test": accuracy(probabilities(model, self.test), self.test.clean),
            "entropy_distance": entropy_distance(forget, probabilities(self.retrained, self.forget)),
        }
        if (self.forget.labels != self.forget.clean).any():
            record["clean"] = accuracy(forget, self.forget.clean)
        if self.shadows:
            record["taken_for_unseen"] = self._taken_for_unseen(forget)
        return record

    def _taken_for_unseen(self, forget: NDArray) -> float | None:
        """Run the membership attack of the paper: shadow models trained with and without the forget rows."""
        roles, outputs = [], []
        for shadow, role in [(m, r) for pair in self.shadows for m, r in zip(pair, ROLES, strict=True)]:
            outputs.append(probabilities(shadow, self.forget))
            roles += [role] * len(self.forget)
        labels = np.tile(self.forget.labels, len(outputs) + 1)
        roles += ["forget"] * len(self.forget)
        return metrics.ShadowAttack.estimate(roles, np.concatenate([*outputs, forget]), labels, self.seed).value


ROLES = ("shadow_member", "shadow_other")


@torch.no_grad()
def probabilities(model: nn.Module, images: Images) -> NDArray:
    """`[N, classes]`."""
    batches = torch.from_numpy(images.pixels).split(250)
    return torch.cat([model.eval()(batch).double().softmax(-1) for batch in batches]).numpy()


def accuracy(probabilities_NC: NDArray, labels_N: NDArray) -> float:
    return float((probabilities_NC.argmax(1) == labels_N).mean())


def entropy_distance(a_NC: NDArray, b_NC: NDArray) -> float:
    """Return the Wasserstein distance of the log-entropies, in log-nats; entropies are at least e^-20."""
    return float(wasserstein_distance(*(log_entropies(p_NC) for p_NC in (a_NC, b_NC))))


def log_entropies(probabilities_NC: NDArray) -> NDArray:
    p_NC = np.maximum(probabilities_NC, np.finfo(np.float64).tiny)
    return np.log(np.maximum(-(p_NC * np.log(p_NC)).sum(1), np.exp(LOWEST)))


# Results


def read(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        raise OutputError(f"{folder} has no {RESULTS}; the run is not finished")
    return files.read_yaml(path)


COLUMNS = {
    "forget": ("forget", 3),
    "clean": ("clean label back", 3),
    "retain": ("retain", 3),
    "test": ("test", 3),
    "entropy_distance": ("entropy distance", 2),
    "taken_for_unseen": ("taken for unseen", 3),
    "drift": ("predicted drift", 4),
    "negative_share": ("negative energy", 4),
    "steps": ("steps", 0),
    "seconds": ("unlearning, s", 1),
}


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Format one line per request and model, with mean and range over runs."""
    every = [model for run in runs for model in run["models"]]
    columns = [key for key in COLUMNS if any(key in model for model in every)]
    keys = dict.fromkeys(sorted(((m["request"], m["model"]) for m in every), key=lambda key: key[0]))
    header = ["request", "model", *(COLUMNS[key][0] for key in columns)]
    lines = [header, ["---"] * 2 + ["---:"] * len(columns)]
    for request, name in keys:
        group = [m for m in every if (m["request"], m["model"]) == (request, name)]
        cells = ([m[key] for m in group if m.get(key) is not None] for key in columns)
        digits = (COLUMNS[key][1] for key in columns)
        lines.append(
            [str(request), name, *(text.spread(v, d) if v else "" for v, d in zip(cells, digits, strict=True))]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
