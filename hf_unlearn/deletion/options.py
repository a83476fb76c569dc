"""Options of a run that its settings name: metrics, and the adapter that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.core.text import one_line
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.request import AdapterOptions
from hf_unlearn.errors import SettingsError

if TYPE_CHECKING:
    from peft import LoraConfig


def metric_names(args: RunArguments) -> list[str] | None:
    """Return the names of the metrics that a run asks for, or None for the default ones."""
    return [name.strip() for name in args.metrics.split(",")] if args.metrics else None


def adapter_options(args: RunArguments) -> AdapterOptions | None:
    """Return the LoRA adapter that a run asks for, or None.

    Raises:
        SettingsError: PEFT does not accept the settings.
    """
    config = peft_config(args)
    return None if config is None else AdapterOptions(peft_config=config, merge=args.merge_adapter)


def peft_config(args: RunArguments) -> LoraConfig | None:
    """Return the configuration of the LoRA adapter that a run asks for, or None; raises as `adapter_options`."""
    if not args.use_peft:
        return None
    from peft import LoraConfig, TaskType

    try:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM if args.task == "language-model" else None,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            use_rslora=args.use_rslora,
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"LoRA settings: {one_line(error)}") from error


def card_facts(args: RunArguments) -> dict[str, str | list[str]]:
    """Return what the metadata of the card says about licence, language and data sets; unknown ones are left out.

    The data set is named if it is one of the Hub. Licence and language are those of the settings, or of the card in the
    folder of a local model.
    """
    facts = _facts_of_card(Path(args.model_name_or_path) / "README.md")
    if args.license:
        facts["license"] = args.license
    if args.language:
        facts["language"] = [name.strip() for name in args.language.split(",") if name.strip()]
    if args.dataset_name and not Path(args.dataset_name).exists():
        facts["datasets"] = [args.dataset_name]
    return facts


def _facts_of_card(card: Path) -> dict[str, str | list[str]]:
    """Return licence and language of a model's card; nothing if there is no card that can be read."""
    if not card.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        metadata = ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    except Exception:  # the errors of yaml and of huggingface_hub share no base class; the base's card is not ours
        return {}
    return {name: metadata[name] for name in ("license", "language") if metadata.get(name)}
