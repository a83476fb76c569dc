"""Publishing from `UnlearningTrainer`: nothing, until it is asked to push a finished model.

Trainer's own methods create the repository in the constructor, publish checkpoints while they are half unlearned,
ignore failures of pushes in the background, overwrite the card, and upload every file of the output folder, including
the pickled arguments with the token in clear text. Here one method writes the finished folder and pushes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo
from torch import nn

from hf_unlearn.core.files import replace_folder
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.run_record import name_base_model

FINISHED = "hub"  # in output_dir: the folder that push_to_hub publishes
PRIVATE = "_private"  # in that folder: what is not published


def push_options(
    args: UnlearningConfig,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    update: bool = False,
) -> PushOptions:
    """Return the options of a push: the explicit ones, and those of `args` for the rest.

    With `push_unfinished` a repository that has other files is always updated.
    """
    return PushOptions(
        private=args.hub_private_repo if private is None else private,
        token=token or args.hub_token,
        revision=revision or args.hub_revision,
        commit_message=commit_message,
        update=update or args.push_unfinished,
    )


def repository_name(args: UnlearningConfig) -> str:
    """Return the name of the repository: `hub_model_id`, or the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


@dataclass(frozen=True, repr=False)
class HubPublisher(ShortRepr):
    """Writes the finished folder of one run, and publishes it.

    Args:
        args: Settings of the run.
        model: The model that it trains.
        save_model: Saves the model to a folder; every process must call it.
    """

    args: UnlearningConfig
    model: nn.Module
    save_model: Callable[[str], None]

    def write_finished(self, report: UnlearningReport) -> Path:
        """Write everything that is published to a folder that appears in one rename; every process must call this."""
        from hf_unlearn.publishing.model_folder import complete_folder

        target = Path(self.args.output_dir) / FINISHED
        if self.args.process_index == 0:
            with replace_folder(target, overwrite=True) as folder:
                name_base_model(self.model, self.args)
                self.save_model(str(folder))
                (folder / PRIVATE).mkdir()
                (folder / "training_args.json").rename(folder / PRIVATE / "training_args.json")
                name = Path(repository_name(self.args)).name
                complete_folder(folder, report, name, self.args.card_template)
        else:
            self.save_model(str(target))
        wait_for_all()
        return target

    def push(self, folder: Path, repo_id: str, options: PushOptions, *, publish_samples: bool = False) -> CommitInfo:
        """Publish a finished folder; see `publishing.push_unlearned_model` for the errors."""
        from hf_unlearn.publishing.model_folder import push_model_folder

        return push_model_folder(folder, folder, repo_id, options, publish_samples=publish_samples)

    def write_missing_card(self, report: UnlearningReport) -> None:
        """Write the card to the output folder, unless there is one."""
        from hf_unlearn.publishing.card import write_card

        folder = Path(self.args.output_dir).absolute()
        if not (folder / "README.md").is_file():
            write_card(report, folder, model_name=folder.name, template=self.args.card_template)
