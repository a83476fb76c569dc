"""The attacks by name."""

from collections.abc import Callable, Iterator

from hf_unlearn.core.registry import Registry
from hf_unlearn.evaluation.attacks.subject import Outcome, Skipped, Subject

Attack = Callable[[Subject], Iterator[Outcome | Skipped]]

ATTACKS: Registry[Attack] = Registry("attack", "hf_unlearn.evaluation.attacks")


def register_attack(name: str) -> Callable[[Attack], Attack]:
    """Function decorator: make an attack available under `name` in `audit` and in commands.

    An attack is a generator: it takes a `Subject` and yields an `Outcome` for each number. It restores what it changes,
    and raises `NotRun` with the reason if the model or the rows do not allow it. `audit` runs it on the unlearned and
    on the retrained model and derives the verdict from `Outcome.memory`. Example, scaling down all weights:

    >>> import torch
    >>> from hf_unlearn.evaluation import ATTACKS, Outcome, bootstrap_mean, register_attack
    >>> from hf_unlearn.models.modes import restored
    >>> @register_attack("shrinking")
    ... def shrinking(subject):
    ...     with restored(subject.model), torch.no_grad():
    ...         for weight in subject.model.parameters():
    ...             weight.mul_(0.5)
    ...         score_N = subject.score(subject.rows["forget"])
    ...     yield Outcome(f"shrunken_{subject.score_name}", "forget", bootstrap_mean(score_N), memory="more")
    >>> "shrinking" in ATTACKS
    True
    >>> ATTACKS.remove("shrinking")

    Raises:
        SettingsError: Another attack has this name.
    """
    return ATTACKS.register(name)
