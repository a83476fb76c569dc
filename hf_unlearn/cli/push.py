"""`hf-unlearn push`: publish a finished folder on the Hub."""

from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import HfArgumentParser

from hf_unlearn.cli.common import Answer, make_parser
from hf_unlearn.core.hub import STATISTICS, publishable
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.deletion.ledger import KEY_VARIABLE, Ledger, open_ledger
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.publishing.model_folder import push_model_folder
from hf_unlearn.statistics.publishing import push_statistics


def parser() -> HfArgumentParser:
    made = make_parser(
        "push", "Publish a finished output folder, or statistics, on the Hub; run again to resume.",
        usage="DIR REPO [options]",
    )  # fmt: skip
    made.add_argument("folder", metavar="DIR", help="Output folder of a run, or folder of statistics.")
    made.add_argument("repo_id", metavar="REPO", help="user/name on the Hub; made if it does not exist.")
    made.add_argument("--private", action="store_true", default=None, help="Make the repository private.")
    made.add_argument("--revision", help="Branch to push to; default: main.")
    made.add_argument("--update", action="store_true", help="Also push into a repository that has other files.")
    made.add_argument("--card_template", metavar="FILE", help="Render the model card anew from your own template.")
    made.add_argument("--publish_samples", action="store_true", help="Also publish prompts of forget rows and answers.")
    made.add_argument("--ledger", metavar="FOLDER", help="Record the push in the ledger that has the request.")
    made.add_argument("--ledger_key_file", metavar="FILE", help=f"File of its key; default: {KEY_VARIABLE}.")
    made.epilog = "The token is read from HF_TOKEN or `hf auth login`; it is never a flag."
    return made


def main(argv: list[str]) -> Answer:
    args = parser().parse_args(argv)
    folder = Path(args.folder)
    options = PushOptions(private=args.private, revision=args.revision, update=args.update)
    if (folder / "statistics.json").is_file():
        commit = push_statistics(folder, args.repo_id, options)
        published = publishable(folder, STATISTICS)
    else:
        ledger, number = _entry(folder, args.ledger, args.ledger_key_file)
        commit = push_model_folder(
            folder,
            folder,
            args.repo_id,
            options,
            card_template=args.card_template,
            publish_samples=args.publish_samples,
        )
        published = publishable(folder)
        if ledger is not None:
            ledger.record_push(number, commit.repo_url.repo_id, commit.oid)
    return _answer(folder, commit, published)


def _entry(folder: Path, ledger: str | None, key_file: str | None) -> tuple[Ledger | None, int]:
    """The ledger to record the push in, and the number of the request, before anything is sent."""
    if ledger is None:
        return None, 0
    found, report = open_ledger(ledger, key_file), UnlearningReport.load(folder)
    commitments = {entry.content["request"]: entry.content["commitment"] for entry in found.requests()}
    number = report.request.get("number", 0)
    if number not in commitments or commitments[number] != report.request.get("commitment"):
        raise SettingsError(f"the ledger {ledger} has no request with the commitment of {folder}; leave out --ledger")
    return found, number


def _answer(folder: Path, commit: CommitInfo, published: list[str]) -> Answer:
    stay = sorted({f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - set(published))
    lines = [f"published and checked ({len(published)} files): {commit.commit_url}"]
    if stay:
        more = ", ..." if len(stay) > 8 else ""
        lines.append(f"not published ({len(stay)} files): {', '.join(stay[:8])}{more}")
    content = {"commit": commit.oid, "url": str(commit.commit_url), "published": published, "not_published": stay}
    return Answer("\n".join(lines), content)
