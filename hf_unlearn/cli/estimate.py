"""`hf-unlearn estimate`: memory and time of a request, and the settings that fit, from a configuration alone."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import check_choice, make_settings_parser, parse
from hf_unlearn.cli.plugins import plugin_flags, take_plugins
from hf_unlearn.cli.setup import hush
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.core.settings import setting
from hf_unlearn.errors import SettingsError
from hf_unlearn.estimate.fit import candidates, fastest_fit
from hf_unlearn.estimate.memory import Memory, estimate_memory
from hf_unlearn.estimate.sizes import OPTIMIZERS, EstimateSettings, Trace
from hf_unlearn.estimate.times import Work, communication, estimate_times
from hf_unlearn.models.tasks import Task
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from transformers import HfArgumentParser

PROCESSES = (1, 2, 4, 8, 16, 32, 64)
PRECISIONS = ("float32", "bfloat16")


@dataclass
class EstimateArguments:
    """Settings of an estimate."""

    model_name_or_path: str = setting("", "Folder or Hub id of a model, also as first argument; its config is read.")
    task: Task | None = setting(None, "What the model does; default: what its configuration says.")
    constraint: str = setting(UnlearningConfig.constraint, f"Constraint on every step: {', '.join(CONSTRAINTS)}.")
    fisher: bool = setting(False, "Also collect Fishers; they are always collected if the constraint needs them.")
    loss: str = setting(UnlearningConfig.loss, "Forget loss; one that reads the original model adds a forward pass.")
    optim: str = setting(UnlearningConfig.optim, f"Optimizer: {', '.join(OPTIMIZERS)}.")
    use_peft: bool = setting(False, "Train a LoRA adapter on all linear modules instead of the weights.")
    lora_r: int = setting(16, "Rank of the adapter.")
    gradient_checkpointing: bool = setting(False, "Compute activations again in the backward pass.")
    dtype: str = setting("float32", "Precision of the weights: float32 (what the commands load) or bfloat16.")
    sketch_above: int = setting(SKETCH_ABOVE, "Sketch the statistics of more features than this.")
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches.")
    batch_size: int = setting(8, "Rows of a batch on each process, when collecting and training.")
    max_length: int = setting(512, "Tokens of a row.")
    rows: int = setting(4000, "Rows to collect statistics on.")
    forget_rows: int = setting(40, "Rows to forget.")
    steps: int = setting(20, "Optimizer steps.")
    memory: str = setting("80GB", "Memory of one device.")
    tflops: float = setting(60.0, "10^12 operations a second that a device reaches in this precision.")
    tflops_float64: float = setting(20.0, "10^12 operations a second in float64, the precision of the statistics.")
    bandwidth: float = setting(2000.0, "10^9 bytes a second of its memory.")
    interconnect: float = setting(100.0, "10^9 bytes a second from and to other processes.")


def parser() -> "HfArgumentParser":
    description = (
        "Estimate the memory and time of a request, and which settings fit, before it runs; no weights are read."
    )
    return make_settings_parser("estimate", description, [EstimateArguments], usage="[MODEL] [options]")


def main(argv: list[str]) -> Answer:
    if argv and not argv[0].startswith("-"):
        argv = ["--model_name_or_path", *argv]
    (args,) = parse(parser(), argv)
    hush()
    device_bytes = _check(args)
    settings = EstimateSettings(args.constraint, args.fisher, args.optim)
    trace = _trace(args, settings)
    fits = {count: fastest_fit(trace, settings, count, device_bytes) for count in PROCESSES}
    if not any(fits.values()):
        _nothing_fits(args, trace, settings)
    work = Work(
        rows=args.rows,
        forget_rows=args.forget_rows,
        batch_size=args.batch_size,
        steps=args.steps,
        tflops=args.tflops,
        tflops64=args.tflops_float64,
        bandwidth=args.bandwidth,
        interconnect=args.interconnect,
    )
    content = _content(args, trace, settings, fits, work, take_plugins(argv)[1])
    return Answer(_text(args, content), content)


def _check(args: EstimateArguments) -> int:
    """Check the settings and return the bytes of one device."""
    from accelerate.utils import convert_file_size_to_int

    from hf_unlearn.models.loading import MODELS, read_config, trained_task

    check_choice("constraint", args.constraint, list(CONSTRAINTS))
    if args.task is None:
        args.task = trained_task(read_config(args.model_name_or_path)) or "language-model"
    check_choice("task", args.task, list(MODELS))
    check_choice("optim", args.optim, list(OPTIMIZERS))
    check_choice("dtype", args.dtype, PRECISIONS)
    positive = ("batch_size", "max_length", "rows", "forget_rows", "steps", "lora_r", "tflops", "tflops_float64")
    for name in (*positive, "bandwidth", "interconnect"):
        if not getattr(args, name) > 0:
            raise SettingsError(f"{name} must be above 0, got {getattr(args, name)}")
    try:
        return convert_file_size_to_int(args.memory)
    except ValueError as error:
        raise SettingsError(f"memory must be a size such as '80GB', got {args.memory!r}") from error


def _trace(args: EstimateArguments, settings: EstimateSettings) -> Trace:
    import torch

    from hf_unlearn.deletion.arguments import RunArguments
    from hf_unlearn.deletion.options import peft_config
    from hf_unlearn.estimate.tracing import trace_model
    from hf_unlearn.losses import build_loss
    from hf_unlearn.models.loading import read_config

    trace = trace_model(
        read_config(args.model_name_or_path),
        args.task or "language-model",
        build_loss(args.loss),
        batch_size=args.batch_size,
        length=args.max_length,
        dtype=getattr(torch, args.dtype),
        fisher=settings.has_fishers,
        gradient_checkpointing=args.gradient_checkpointing,
        peft_config=peft_config(RunArguments(use_peft=args.use_peft, lora_r=args.lora_r, task=args.task)),
    )
    return replace(trace, sketching=Sketching(args.sketch_above, args.sketch_rank))


def _nothing_fits(args: EstimateArguments, trace: Trace, settings: EstimateSettings) -> None:
    estimates = [estimate_memory(trace, c) for count in PROCESSES for c in candidates(settings, count)]
    least = min(estimates, key=lambda memory: memory.peak)
    phase = max(least.phases, key=lambda name: least.phases[name])
    raise SettingsError(
        f"nothing fits in {args.memory} on up to {PROCESSES[-1]} processes: phase '{phase}' needs at least "
        f"{least.peak / 1e9:.1f} GB; use a smaller batch_size or max_length, use_peft, bfloat16, or more memory"
    )


def _content(
    args: EstimateArguments,
    trace: Trace,
    settings: EstimateSettings,
    fits: Mapping[int, tuple[EstimateSettings, Memory] | None],
    work: Work,
    plugins: list[str],
) -> dict[str, Any]:
    """Return the estimate on one process, and a plan for each number of processes."""

    def times(plan: EstimateSettings) -> dict[str, Any]:
        return {name: asdict(phase) for name, phase in estimate_times(trace, plan, work).items()}

    plans = []
    for count, fit in fits.items():
        row: dict[str, Any] = {"processes": count, "fits": fit is not None}
        if fit is not None:
            plan, memory = fit
            row |= {
                "settings": asdict(plan),
                "memory": asdict(memory),
                "times": times(plan),
                "launch": launch_line(args, plan, plugins),
                "communication": communication(trace, plan),
            }
        plans.append(row)
    return {
        "model": args.model_name_or_path,
        "parameters": trace.parameters,
        "layers": len(trace.layers),
        "grams": len(trace.grams),
        "memory": asdict(estimate_memory(trace, settings)),
        "times": times(settings),
        "plans": plans,
    }


def launch_line(args: EstimateArguments, plan: EstimateSettings, plugins: list[str]) -> str:
    """Return the command, or the settings of your own program if the weights are sharded from the start."""
    flags = [f"--keep_statistics_on {plan.place}"] * (plan.place != "device")
    flags += [] if plan.max_memory is None else [f"--max_memory {plan.max_memory // 10**6}MB"]
    sketching = {"sketch_above": SKETCH_ABOVE, "sketch_rank": SKETCH_RANK}
    flags += [f"--{name} {getattr(args, name)}" for name, usual in sketching.items() if getattr(args, name) != usual]
    for name in ("constraint", "optim", "loss"):
        flags += [f"--{name} {getattr(args, name)}"]
    flags += [f"--per_device_train_batch_size {args.batch_size} --per_device_eval_batch_size {args.batch_size}"]
    flags += ["--gradient_checkpointing True"] * args.gradient_checkpointing
    flags += [f"--use_peft True --lora_r {args.lora_r}"] * args.use_peft
    flags += [shlex.join(plugin_flags(plugins))] * bool(plugins)
    config = "fsdp2" if plan.sharding == "fsdp2" else "ddp"
    launch = [f"--accelerate_config {config} --num_processes {plan.processes}"] * (plan.processes > 1)
    if plan.processes > 8:
        launch += [f"--num_machines {plan.processes // 8} --machine_rank I --main_process_ip ADDRESS"]
    if plan.sharded_before or args.dtype != "float32":
        state = "sharded before collecting" if plan.sharded_before else f"in {args.dtype}"
        nodes = f"--nnodes {plan.processes // 8} " * (plan.processes > 8)
        start = f"torchrun {nodes}--nproc_per_node {min(plan.processes, 8)} YOURS.py (model {state}), UnlearningConfig:"
        return " ".join([start, *["fsdp2"] * (config == "fsdp2"), *flags])
    return " ".join(["hf-unlearn run FILE.yaml", *launch, *flags])


def _text(args: EstimateArguments, content: dict[str, Any]) -> str:
    held, phases, times = content["memory"]["held"], content["memory"]["phases"], content["times"]
    lines = [
        f"{content['model']}: {content['parameters'] / 1e9:.3f} billion parameters in {args.dtype}, "
        f"{content['layers']} covered layers, {content['grams']} Grams",
        "\nheld while training, one process (GB)",
    ]
    lines += [f"  {name:<16} {size / 1e9:>10.3f}" for name, size in held.items()]
    lines += [f"\n{'phase':<12} {'peak GB':>10} {'TFLOP':>12} {'seconds':>10}"]
    for name in ("load", "collect", "decompose", "bind", "train"):
        time = times.get({"train": "step"}.get(name, name))
        spent = f" {time['flops'] / 1e12:>12.2f} {time['seconds']:>10.2f}" if time else ""
        lines.append(f"{name:<12} {phases[name] / 1e9:>10.3f}{spent}" + " a step" * (name == "train"))
    request = times["request"]
    lines.append(f"{'request':<12} {'':>10} {request['flops'] / 1e12:>12.2f} {request['seconds']:>10.2f}")
    lines.append(f"\n{'processes':>9} {'peak GB':>8} {'GB/step':>8} {'seconds':>9}  fits in {args.memory}")
    for row in content["plans"]:
        if not row["fits"]:
            lines.append(f"{row['processes']:>9} {'':>27}  nothing")
            continue
        peak, sent = max(row["memory"]["phases"].values()) / 1e9, sum(row["communication"].values()) / 1e9
        seconds = row["times"]["request"]["seconds"]
        lines.append(f"{row['processes']:>9} {peak:>8.2f} {sent:>8.2f} {seconds:>9.1f}  {row['launch']}")
    return "\n".join(lines)
