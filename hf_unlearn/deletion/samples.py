"""Sample answers: what a model says to the prompts of the first forget rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.evaluation.generation import can_answer, generate_answers
from hf_unlearn.evaluation.greedy import content_phrases, revealed
from hf_unlearn.models.tasks import CONTENT_MASK, IGNORED, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_TOKENS = 40
"""Longest sample answer, in tokens."""
DEFAULT_SAMPLES = 3
"""Number of sample answers of a language model that a run shows if it was not asked for any."""
STILL_SAYS = "still says"
"""Column of a sample with what the answer after unlearning still gives away."""


@dataclass(frozen=True, repr=False)
class ForgetSamples(ShortRepr):
    """Answers the prompts of forget rows with a model, by greedy decoding.

    Attributes:
        rows: Encoded forget rows; the first ones of the forget set.
        tokenizer: The model's tokenizer.
        private: The answers are for the terminal only. Rows that cannot be answered are left out then.
    """

    rows: Sequence[Row]
    tokenizer: PreTrainedTokenizerBase
    private: bool = False

    def __call__(self, model: nn.Module) -> list[dict[str, str]]:
        """Return the prompt and the answer of each row."""
        numbers = self._numbers(model)
        if not numbers:
            return []
        rows = [self.rows[number] for number in numbers]
        prompts = [row["input_ids"][: _prompt_length(row)] for row in rows]
        questions = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        answers = generate_answers(model, rows, self.tokenizer, max_new_tokens=SAMPLE_TOKENS)
        return [
            {"prompt": _last_turn(question.strip()), "answer": text}
            for question, text in zip(questions, answers, strict=True)
        ]

    def still_says(self, model: nn.Module, forget: Rows, answers: Sequence[str]) -> list[str]:
        """Return what each answer gives away of its row: content phrases, separated by commas, or nothing.

        Args:
            model: The model that has answered.
            forget: The forget set, whose rows say which labels are content; of others nothing is known.
            answers: Its answers.
        """
        said = []
        for number, answer in zip(self._numbers(model), answers, strict=True):
            row = forget[number]
            phrases = [] if row.get(CONTENT_MASK) is None else content_phrases(row, self.tokenizer)
            said.append(", ".join(revealed(row, answer, phrases)))
        return said

    def _numbers(self, model: nn.Module) -> list[int]:
        """Return the numbers of the rows that are answered."""
        if not self.private:
            return list(range(len(self.rows)))
        context = context_length(model)
        lengths = [_prompt_length(row) for row in self.rows]
        fits = [length > 0 and (context is None or length < context) for length in lengths]
        return [number for number, is_fit in enumerate(fits) if is_fit] if can_answer(model) else []


def with_answers_after(
    before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], says: Sequence[str]
) -> list[dict[str, str]]:
    """Return sample answers before and after unlearning, with what the latter still give away.

    >>> with_answers_after([{"prompt": "Where?", "answer": "In Ulm."}], [{"answer": "Ulm!"}], ["Ulm"])
    [{'prompt': 'Where?', 'answer': 'In Ulm.', 'after': 'Ulm!', 'still says': 'Ulm'}]
    """
    joined = [{**old, "after": new["answer"]} for old, new in zip(before, after, strict=True)]
    if not says:
        return joined
    return [{**sample, STILL_SAYS: text or "nothing"} for sample, text in zip(joined, says, strict=True)]


def _prompt_length(row: Row) -> int:
    return next(place for place, label in enumerate(row["labels"]) if label != IGNORED)


def _last_turn(prompt: str) -> str:
    """Return the question alone, without the roles of the chat template."""
    lines = [line for line in prompt.splitlines() if line.strip() not in ("", "assistant", "user", "Answer:")]
    return lines[-1].removeprefix("Question: ") if lines else prompt
