"""`hf-unlearn estimate`: how large and how long a request is, and what fits, from a configuration alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate.utils import convert_file_size_to_int
from transformers import HfArgumentParser

from hf_unlearn.cli.common import Answer, check_choice, hush, make_parser, parse
from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.core.settings import setting
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.build import peft_config
from hf_unlearn.errors import SettingsError
from hf_unlearn.estimate import memory as estimate
from hf_unlearn.estimate.memory import Memory, Settings, Work
from hf_unlearn.estimate.tracing import Trace, read_config, trace
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.models.loading import MODELS
from hf_unlearn.models.tasks import Task
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching

PROCESSES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class EstimateArguments:
    model_name_or_path: str = setting("", "Folder or Hub id of a model, also as first argument; its config is read.")
    task: Task = setting("language-model", "What the model does.")
    constraint: str = setting(estimate.Settings.constraint, f"Constraint on every step: {', '.join(CONSTRAINTS)}.")
    fisher: bool = setting(False, "Also collect Fishers; kronecker needs them anyway.")
    loss: str = setting("ce_u", "Forget loss; one that reads the original model makes a further pass.")
    optim: str = setting("sgd", f"Optimizer: {', '.join(estimate.OPTIMIZERS)}.")
    use_peft: bool = setting(False, "Train a LoRA adapter on all linear modules instead of the weights.")
    lora_r: int = setting(16, "Its rank.")
    gradient_checkpointing: bool = setting(False, "Compute activations again in the backward pass.")
    dtype: str = setting("float32", "Precision of the weights: float32 (what the commands load) or bfloat16.")
    sketch_above: int = setting(SKETCH_ABOVE, "Sketch the statistics of more features than this.")
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches.")
    batch_size: int = setting(8, "Rows of a batch on each process, when collecting and training.")
    max_length: int = setting(512, "Tokens of a row.")
    rows: int = setting(4000, "Rows to collect statistics on.")
    forget_rows: int = setting(40, "Rows to forget.")
    steps: int = setting(20, "Optimizer steps.")
    memory: str = setting("80GB", "Memory of one device, for what fits.")
    tflops: float = setting(60.0, "10^12 operations a second that a device reaches in this precision.")
    tflops_float64: float = setting(20.0, "The same in float64, in which statistics are.")
    bandwidth: float = setting(2000.0, "10^9 bytes a second of its memory.")
    interconnect: float = setting(100.0, "10^9 bytes a second from and to other processes.")


def parser() -> HfArgumentParser:
    about = "Say how large and how long a request is, and what settings fit, before it is run; no weights are read."
    return make_parser("estimate", about, [EstimateArguments], usage="[MODEL] [options]")


def main(argv: list[str]) -> Answer:
    if argv and not argv[0].startswith("-"):
        argv = ["--model_name_or_path", *argv]
    (args,) = parse(parser(), argv)
    hush()
    room = _check(args)
    settings = Settings(args.constraint, args.fisher, args.optim)
    adapter = peft_config(RunArguments(use_peft=args.use_peft, lora_r=args.lora_r, task=args.task))
    found = trace(
        read_config(args.model_name_or_path), args.task, build_loss(args.loss), batch_size=args.batch_size,
        length=args.max_length, dtype=estimate.dtype_of(args.dtype),
        fisher=args.fisher or needs_fisher(args.constraint), gradient_checkpointing=args.gradient_checkpointing,
        peft_config=adapter,
    )  # fmt: skip
    found = replace(found, sketching=Sketching(args.sketch_above, args.sketch_rank))
    one = estimate.memory(found, settings)
    fits = {count: estimate.fitting(found, settings, count, room) for count in PROCESSES}
    if not any(fits.values()):
        _nothing_fits(args, found, settings)
    work = Work(
        args.rows, args.forget_rows, args.batch_size, args.steps, args.tflops, args.tflops_float64, args.bandwidth,
        args.interconnect,
    )  # fmt: skip
    content = _content(args, found, settings, one, fits, work)
    return Answer(_text(args, content), content)


def _check(args: EstimateArguments) -> int:
    check_choice("constraint", args.constraint, list(CONSTRAINTS))
    check_choice("task", args.task, list(MODELS))
    check_choice("optim", args.optim, list(estimate.OPTIMIZERS))
    check_choice("loss", args.loss, sorted(LOSSES))
    for name in ("batch_size", "max_length", "rows", "forget_rows", "steps", "lora_r", "tflops", "tflops_float64",
                 "bandwidth", "interconnect"):  # fmt: skip
        if not getattr(args, name) > 0:
            raise SettingsError(f"{name} must be above 0, got {getattr(args, name)}")
    try:
        return convert_file_size_to_int(args.memory)
    except ValueError as error:
        raise SettingsError(f"memory must be a size such as '80GB', got {args.memory!r}") from error


def _nothing_fits(args: EstimateArguments, found: Trace, settings: Settings) -> None:
    peaks = {c: estimate.memory(found, c) for count in PROCESSES for c in estimate.candidates(settings, count)}
    best = min(peaks.values(), key=lambda memory: memory.peak)
    phase = max(best.phases, key=lambda name: best.phases[name])
    raise SettingsError(
        f"nothing fits in {args.memory} on up to {PROCESSES[-1]} processes: at least {best.peak / 1e9:.1f} GB, while "
        f"it does '{phase}'; take a smaller batch_size or max_length, use_peft, bfloat16, or more memory"
    )


def _content(
    args: EstimateArguments, found: Trace, settings: Settings, one: Memory,
    fits: Mapping[int, tuple[Settings, Memory] | None], work: Work,
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for count, fit in fits.items():
        row: dict[str, Any] = {"processes": count, "fits": fit is not None}
        if fit is not None:
            own, memory = fit
            times = {name: asdict(phase) for name, phase in estimate.times(found, own, work).items()}
            row |= {
                "settings": asdict(own), "memory": asdict(memory), "times": times, "launch": launch_line(args, own),
                "communication": estimate.communication(found, own),
            }  # fmt: skip
        rows.append(row)
    times = {name: asdict(phase) for name, phase in estimate.times(found, settings, work).items()}
    return {
        "model": args.model_name_or_path, "parameters": found.parameters, "layers": len(found.layers),
        "grams": len(found.grams), "memory": asdict(one), "times": times, "plans": rows,
    }  # fmt: skip


def launch_line(args: EstimateArguments, own: Settings) -> str:
    """The command, or for weights that are sharded from the start the settings of your own program."""
    flags = [f"--keep_statistics_on {own.place}"] * (own.place != "device")
    flags += [] if own.max_memory is None else [f"--max_memory {own.max_memory // 10**6}MB"]
    sketching = {"sketch_above": SKETCH_ABOVE, "sketch_rank": SKETCH_RANK}
    flags += [f"--{name} {getattr(args, name)}" for name, usual in sketching.items() if getattr(args, name) != usual]
    for name in ("constraint", "optim", "loss"):
        flags += [f"--{name} {getattr(args, name)}"]
    flags += [f"--per_device_train_batch_size {args.batch_size} --per_device_eval_batch_size {args.batch_size}"]
    flags += ["--gradient_checkpointing True"] * args.gradient_checkpointing
    flags += [f"--use_peft True --lora_r {args.lora_r}"] * args.use_peft
    config = "fsdp2" if own.sharding == "fsdp2" else "ddp"
    launch = [f"--accelerate_config {config} --num_processes {own.processes}"] * (own.processes > 1)
    if own.processes > 8:
        launch += [f"--num_machines {own.processes // 8} --machine_rank I --main_process_ip ADDRESS"]
    if own.sharded_before or args.dtype != "float32":
        what = "sharded before collecting" if own.sharded_before else f"in {args.dtype}"
        nodes = f"--nnodes {own.processes // 8} " * (own.processes > 8)
        start = f"torchrun {nodes}--nproc_per_node {min(own.processes, 8)} YOURS.py (model {what}), UnlearningConfig:"
        return " ".join([start, *["fsdp2"] * (config == "fsdp2"), *flags])
    return " ".join(["hf-unlearn run FILE.yaml", *launch, *flags])


def _text(args: EstimateArguments, content: dict[str, Any]) -> str:
    parts, phases, times = content["memory"]["parts"], content["memory"]["phases"], content["times"]
    lines = [
        f"{content['model']}: {content['parameters'] / 1e9:.3f} billion parameters in {args.dtype}, "
        f"{content['layers']} covered layers, {content['grams']} Grams", "\nheld while training, one process (GB)",
    ]  # fmt: skip
    lines += [f"  {name:<16} {size / 1e9:>10.3f}" for name, size in parts.items()]
    lines += [f"\n{'phase':<12} {'peak GB':>10} {'TFLOP':>12} {'seconds':>10}"]
    for name in ("load", "collect", "decompose", "bind", "train"):
        time = times.get({"train": "step"}.get(name, name))
        spent = f" {time['flops'] / 1e12:>12.2f} {time['seconds']:>10.2f}" if time else ""
        lines.append(f"{name:<12} {phases[name] / 1e9:>10.3f}{spent}" + " a step" * (name == "train"))
    whole = times["request"]
    lines.append(f"{'request':<12} {'':>10} {whole['flops'] / 1e12:>12.2f} {whole['seconds']:>10.2f}")
    lines.append(f"\n{'processes':>9} {'peak GB':>8} {'GB/step':>8} {'seconds':>9}  fits in {args.memory}")
    for row in content["plans"]:
        if not row["fits"]:
            lines.append(f"{row['processes']:>9} {'':>27}  nothing")
            continue
        peak, sent = max(row["memory"]["phases"].values()) / 1e9, sum(row["communication"].values()) / 1e9
        seconds = row["times"]["request"]["seconds"]
        lines.append(f"{row['processes']:>9} {peak:>8.2f} {sent:>8.2f} {seconds:>9.1f}  {row['launch']}")
    return "\n".join(lines)
