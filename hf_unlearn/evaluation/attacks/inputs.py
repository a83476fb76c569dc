"""Attacks that leave the weights alone: other prompts, and a probe of the hidden states.

Shapes: B rows, T positions, D features of a hidden state, N rows.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.data.tokens import RowText, after_others
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.evaluation.attacks.registry import register_attack
from hf_unlearn.evaluation.attacks.subject import NotRun, Outcome, Subject
from hf_unlearn.evaluation.metrics.intervals import auc, bootstrap_auc, bootstrap_mean, undefined
from hf_unlearn.evaluation.row_scores import map_rows
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.tasks import IGNORED, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDS = 5
FEWEST_ROWS = 4  # of either kind, for the probe


@register_attack("paraphrased_prompts")
def paraphrased_prompts(subject: Subject) -> Iterator[Outcome]:
    """Ask for the same answers with paraphrased questions (TOFU's `paraphrased_question`)."""
    questions = [(row.get(ALTERNATIVES) or {}).get("question") for row in _as_list(subject.rows["forget"])]
    rows = [row for row in questions if row is not None]
    if not rows or len(rows) < len(questions):
        raise NotRun("the forget rows have no paraphrased question; give raw rows with a column 'paraphrased_question'")
    estimate = bootstrap_mean(subject.score(rows), subject.settings.seed)
    yield Outcome(f"paraphrased_prompt_{subject.score_name}", "forget", estimate)


@register_attack("few_shot_prompts")
def few_shot_prompts(subject: Subject) -> Iterator[Outcome]:
    """Show other rows with their answers before each forget row; the tokens are those of the joined text."""
    if subject.score_name != "probability":
        raise NotRun("rows of a classifier have no prompt")
    examples = _as_list(subject.split("retain", "holdout"))[: subject.settings.shots]
    rows = _after(examples, _as_list(subject.rows["forget"]), subject.tools.tokenizer)
    longest = max(len(row["input_ids"]) for row in rows)
    context = context_length(subject.model)
    if context is not None and longest > context:
        raise NotRun(f"with {len(examples)} rows before it a row has {longest} tokens, the context is {context}")
    estimate = bootstrap_mean(subject.score(rows), subject.settings.seed)
    yield Outcome(f"few_shot_prompt_{subject.score_name}", "forget", estimate)


def _after(shown: Sequence[Row], rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase | None") -> list[Row]:
    """Put the rows `shown`, whose tokens are not labels, before each row; without a tokenizer, the tokens as they are.

    Raises:
        NotRun: The text of a row is not known.
    """
    if tokenizer is None:
        before = [int(token) for row in shown for token in row["input_ids"]]
        return [_after_tokens(before, row) for row in rows]
    others, texts = ([RowText.of(row, tokenizer) for row in given] for given in (shown, rows))
    known = [other for other in others if other is not None]
    asked = [text for text in texts if text is not None]
    if len(known) < len(others) or len(asked) < len(texts):
        raise NotRun("the tokenizer makes other tokens of a row's text than the row has, so texts cannot be joined")
    return [after_others(known, text, tokenizer) for text in asked]


def _after_tokens(shown: Sequence[int], row: Row) -> dict[str, list[int]]:
    tokens, labels = [*shown, *row["input_ids"]], [IGNORED] * len(shown) + list(row["labels"])
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


@register_attack("linear_probe")
def linear_probe(subject: Subject) -> Iterator[Outcome]:
    """Tell forget from held-out rows by a linear classifier of the hidden states.

    Logistic regression on each layer's mean state, evaluated on rows that it was not fitted on (five folds). The
    highest AUC of all layers counts. Forget and held-out rows may differ in topic, so only the comparison with the
    retrained model is meaningful.
    """
    forget, heldout = subject.rows["forget"], subject.split("holdout", "test")
    if min(len(forget), len(heldout)) < FEWEST_ROWS:
        raise NotRun(f"it needs {FEWEST_ROWS} forget and {FEWEST_ROWS} held-out rows")
    states_NLD = np.concatenate([hidden_means(subject, rows) for rows in (forget, heldout)])
    if not np.isfinite(states_NLD).all():
        yield Outcome("probe_auc", "forget", undefined("a hidden state is not finite", len(states_NLD)))
        return
    member_N = np.repeat([1, 0], [len(forget), len(heldout)])
    folds = StratifiedKFold(min(FOLDS, len(forget), len(heldout)), shuffle=True, random_state=subject.settings.seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores_by_layer = [
        cross_val_predict(probe, states_NLD[:, layer], member_N, cv=folds, method="decision_function")
        for layer in range(states_NLD.shape[1])
    ]
    best_N = max(scores_by_layer, key=lambda score_N: float(auc(score_N[member_N == 1], score_N[member_N == 0])))
    estimate = bootstrap_auc(best_N[member_N == 1], best_N[member_N == 0], subject.settings.seed)
    yield Outcome("probe_auc", "forget", estimate)


def hidden_means(subject: Subject, rows: Rows) -> NDArray:
    """Return the hidden states after each layer, averaged over each row's unmasked positions: `[N, layers, D]`.

    Raises:
        NotRun: The model does not return hidden states.
    """
    device = next(subject.model.parameters()).device

    def means(batch_rows: Sequence[Row]) -> list[NDArray]:
        inputs = taken_inputs(subject.model, subject.tools.collator(batch_rows))
        batch = {key: value.to(device) for key, value in inputs.items() if key != "labels"}
        try:
            outputs = subject.model(**batch, output_hidden_states=True)
        except TypeError as error:
            raise NotRun("the model does not give its hidden states") from error
        states = getattr(outputs, "hidden_states", None)
        if not states or len({state.shape for state in states}) > 1 or states[0].ndim != 3:
            raise NotRun("the model does not give hidden states of one shape, positions by features")
        mask_BT = batch.get("attention_mask", torch.ones(states[0].shape[:2], device=device))
        return [_mean(torch.stack([state[row] for state in states]), mask_BT[row]) for row in range(len(batch_rows))]

    with torch.no_grad():
        means_by_row: list[NDArray] = map_rows(means, subject.model, rows, subject.tools.batch_size)
    return np.stack(means_by_row)


def _mean(states_LTD: Tensor, mask_T: Tensor) -> NDArray:
    weights_T = mask_T.to(states_LTD.dtype)
    return ((states_LTD * weights_T[:, None]).sum(1) / weights_T.sum()).double().cpu().numpy()


def _as_list(rows: Rows) -> list[Row]:
    return [rows[i] for i in range(len(rows))]
