"""`hf-unlearn push`: publish a finished folder on the Hub."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_parser
from hf_unlearn.deletion.ledger import Ledger, open_ledger
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE
from hf_unlearn.errors import SettingsError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def parser() -> ArgumentParser:
    flags = make_parser(
        "push",
        "Publish a finished output folder, or statistics, on the Hub; run again to resume.",
        usage="DIR REPO [options]",
    )
    flags.add_argument("folder", metavar="DIR", help="Output folder of a run, or folder of statistics.")
    flags.add_argument("repo_id", metavar="REPO", help="user/name on the Hub; created if it does not exist.")
    flags.add_argument("--private", action="store_true", default=None, help="Make the repository private.")
    flags.add_argument("--revision", help="Branch to push to; default: main.")
    flags.add_argument("--update", action="store_true", help="Also push into a repository that has other files.")
    flags.add_argument("--card_template", metavar="FILE", help="Render the model card again, from your own template.")
    flags.add_argument(
        "--publish_samples", action="store_true", help="Also publish prompts of forget rows and the answers."
    )
    flags.add_argument("--ledger", metavar="FOLDER", help="Record the push in the ledger of the request.")
    flags.add_argument("--ledger_key_file", metavar="FILE", help=f"File with its key; default: {KEY_VARIABLE}.")
    flags.epilog = "The token is read from HF_TOKEN or `hf auth login`; it is never a flag."
    return flags


def main(argv: list[str]) -> Answer:
    args = parser().parse_args(argv)
    from hf_unlearn.core.published_files import STATISTICS, publishable
    from hf_unlearn.core.push_options import PushOptions
    from hf_unlearn.publishing.model_folder import push_model_folder
    from hf_unlearn.statistics.publishing import push_statistics

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
    """Return the ledger to record the push in and the number of the request, before anything is sent."""
    if ledger is None:
        return None, 0
    from hf_unlearn.evaluation.report import UnlearningReport

    opened, report = open_ledger(ledger, key_file), UnlearningReport.load(folder)
    commitments = {entry.content["request"]: entry.content["commitment"] for entry in opened.requests()}
    number = report.request.get("number", 0)
    if number not in commitments or commitments[number] != report.request.get("commitment"):
        raise SettingsError(f"the ledger {ledger} has no request with the commitment of {folder}; leave out --ledger")
    return opened, number


def _answer(folder: Path, commit: "CommitInfo", published: list[str]) -> Answer:
    unpublished = sorted({f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - set(published))
    lines = [f"published and checked ({len(published)} files): {commit.commit_url}"]
    if unpublished:
        more = ", ..." if len(unpublished) > 8 else ""
        lines.append(f"not published ({len(unpublished)} files): {', '.join(unpublished[:8])}{more}")
    content = {
        "commit": commit.oid,
        "url": str(commit.commit_url),
        "published": published,
        "not_published": unpublished,
    }
    return Answer("\n".join(lines), content)
