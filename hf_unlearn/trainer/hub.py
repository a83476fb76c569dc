"""What `UnlearningTrainer` does on the Hub: nothing, until it is asked to push a finished model."""

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import Trainer

from hf_unlearn.core.files import replace_folder
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.trainer.run_record import describe, name_base_model

FINISHED = "hub"  # below output_dir: the folder that push_to_hub publishes
PRIVATE = "_private"  # in there: what it does not


class HubMixin(Trainer):
    """The Hub side of Trainer, made safe.

    Trainer's own makes the repository in its constructor, publishes checkpoints while they are half unlearned, swallows
    failures of pushes in the background, overwrites the card, and uploads whatever lies in the output folder, the
    pickled arguments with the token in clear text among it.
    """

    if TYPE_CHECKING:
        hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Name the repository; the first push makes it."""
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.push_in_progress = None

    def report(self) -> UnlearningReport:
        """What was done so far; its `metrics` are empty until you put those of `evaluate_unlearning` there."""
        rows = self.train_dataset
        report = UnlearningReport(versions=package_versions(), hardware=hardware())
        report.request = {"rows": len(rows), "date": datetime.now(timezone.utc).date().isoformat()}
        describe(report, self, retain_rows=0 if rows.retain is None else len(rows.retain))
        return report

    def push_to_hub(
        self,
        commit_message: str | None = "Unlearned model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        report: UnlearningReport | None = None,
        update: bool = False,
        publish_samples: bool = False,
    ) -> CommitInfo | None:
        """Write model, report, card and plots to the folder `hub` of `output_dir`, then publish that folder.

        Args:
            commit_message, token, revision, private: As in Trainer; see `push_unlearned_model`.
            blocking: Only True: what was published is checked.
            report: The finished report, such as that of `evaluate_unlearning`; what it lacks is filled in from this
                run. Default: what the trainer knows, with nothing measured.
            update: Also push into a repository that has other files; always so with `push_unfinished`.
            publish_samples: As in `push_unlearned_model`.

        Returns:
            The commit; None on other processes than the first.

        Raises:
            PushError, SettingsError: See `push_unlearned_model`.
        """
        from hf_unlearn.publishing.model_folder import push_unlearned_model

        if not blocking:
            raise SettingsError("push_to_hub checks what was published and so has to wait; pass blocking=True")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = self._write_finished(self._completed(report))
        if not self.is_world_process_zero():
            return None
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo()
        assert self.hub_model_id is not None
        return push_unlearned_model(
            folder, folder, self.hub_model_id, token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision, commit_message=commit_message or "Unlearned model",
            update=update or self.args.push_unfinished, publish_samples=publish_samples,
        )  # fmt: skip

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """The card of this run in `output_dir`, if there is none yet; one that is there stays as it is."""
        from hf_unlearn.publishing.card import write_card

        report = self.report()  # every process has its part in the drift
        if self.is_world_process_zero() and not (Path(self.args.output_dir) / "README.md").is_file():
            name = Path(self.args.output_dir).absolute().name
            write_card(report, self.args.output_dir, model_name=name, template=self.args.card_template)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing, unless both `hub_strategy` and `push_unfinished` ask for it."""
        if self.args.push_unfinished and self.args.hub_strategy != "end":
            self.push_to_hub(f"Unfinished: step {self.state.global_step}")

    def _completed(self, report: UnlearningReport | None) -> UnlearningReport:
        own = self.report()
        if report is None:
            return own
        for name in ("request", "method", "settings", "versions", "hardware", "history", "drift"):
            if not getattr(report, name):
                setattr(report, name, getattr(own, name))
        return report

    def _write_finished(self, report: UnlearningReport) -> Path:
        """Everything that is published, in a folder that appears in one rename; every process takes part in saving."""
        from hf_unlearn.publishing.model_folder import complete_folder

        target = Path(self.args.output_dir) / FINISHED
        if self.is_world_process_zero():
            with replace_folder(target, overwrite=True) as folder:
                name_base_model(self.model, self.args)
                self.save_model(str(folder), _internal_call=True)
                (folder / PRIVATE).mkdir()
                (folder / "training_args.json").rename(folder / PRIVATE / "training_args.json")
                name = Path(self.args.hub_model_id or self.args.output_dir).absolute().name
                complete_folder(folder, report, name, self.args.card_template)
        else:
            self.save_model(str(target), _internal_call=True)
        wait_for_all()
        return target
