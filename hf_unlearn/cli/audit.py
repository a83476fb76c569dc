"""`hf-unlearn audit`: attack a finished model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_run_parser, parse
from hf_unlearn.cli.settings_file import is_settings_file
from hf_unlearn.cli.setup import hush, join_processes
from hf_unlearn.core.settings import setting
from hf_unlearn.deletion.arguments import AttackArguments

if TYPE_CHECKING:
    from transformers import HfArgumentParser


@dataclass
class AuditArguments(AttackArguments):
    """Settings of an audit."""

    original: str | None = setting(None, "Folder or Hub id of the model before unlearning.")
    max_length: int | None = setting(512, "Longest row in tokens, as in the run; longer rows are cut.")
    per_device_eval_batch_size: int = setting(16, "Rows in a forward pass.")
    seed: int = setting(0, "Seed of the choice of rows and of the bootstrap.")
    update_model: bool = setting(False, "Add the results to the report and card in the model's folder.")
    card_template: str | None = setting(None, "Your own template of that card; default: the package's.")
    output_dir: str | None = setting(None, "Also write the report to this folder.")
    overwrite_output_dir: bool = setting(False, "Replace the contents of the output folder.")


def parser() -> "HfArgumentParser":
    return make_run_parser("audit", "Attack a finished model.", [AuditArguments], "[MODEL | FILE.yaml] [options]")


def main(argv: list[str]) -> Answer:
    if argv and not argv[0].startswith("-") and not is_settings_file(argv[0]):
        argv = ["--model_name_or_path", *argv]
    (args,) = parse(parser(), argv)
    from hf_unlearn.core.files import check_output, replace_folder
    from hf_unlearn.core.processes import is_main
    from hf_unlearn.deletion.run import add_audit, audit_finished
    from hf_unlearn.evaluation.attacks.auditing import AuditSettings
    from hf_unlearn.publishing.card import check_template

    if args.card_template is not None:
        check_template(args.card_template)
    join_processes()
    hush()
    if args.output_dir:
        check_output(args.output_dir, args.overwrite_output_dir)
    settings = AuditSettings(
        args.relearn_rows, args.relearn_steps, args.relearn_learning_rate, shots=args.shots, seed=args.seed
    )
    report = audit_finished(
        args, args.original, args.attacks, settings, args.per_device_eval_batch_size, args.max_length
    )
    lines = [report.table() if report.metrics else "no attack could be run"]
    for title, reasons in (("verdict", report.audit["verdicts"]), ("not run", report.audit["not_run"])):
        lines += [f"{title}: {name}: {reason}" for name, reason in reasons.items()]
    if args.update_model:
        if is_main():
            add_audit(report, Path(args.model_name_or_path), args.card_template)
        lines.append(f"added to the report and card in {args.model_name_or_path}")
    if args.output_dir:
        if is_main():
            with replace_folder(args.output_dir, args.overwrite_output_dir) as folder:
                report.save(folder)
        lines.append(f"saved to {args.output_dir}")
    return Answer("\n".join(lines), {"output_dir": args.output_dir, "report": report.content()})
