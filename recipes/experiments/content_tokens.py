"""Compare the ways to tell content tokens without a retrained model with what a retrained model says.

    python recipes/experiments/content_tokens.py recipes/default/smollm2_tofu.yaml --retrained auto

Takes the settings of `hf-unlearn run`, with `fine_tune` and a retrained model. A token of a forget row is truly content
if the retrained model finds it more than two nats less likely than the original does. The script prints, for the
checkpoint before fine-tuning and for the short context, the share of tokens that they call content, their precision and
their recall.
"""

import sys
from collections.abc import Sequence

import numpy as np

from hf_unlearn import SettingsError, UnlearningError
from hf_unlearn.cli import parsers
from hf_unlearn.cli import run as run_command
from hf_unlearn.data import default_collator
from hf_unlearn.deletion import build_request
from hf_unlearn.evaluation import content_masks
from hf_unlearn.models import load_model


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, config = parsers.parse(run_command.parser(), list(sys.argv[1:] if argv is None else argv))
        if not args.fine_tune or args.retrained in (None, "none"):
            raise SettingsError("content_tokens.py compares with a retrained model; pass --fine_tune and --retrained")
        request = build_request(args, config.but(constraint="none"), fisher=False)
        base = load_model(args.model_name_or_path)
    except UnlearningError as error:
        print(f"content_tokens.py: {error}", file=sys.stderr)
        return 2
    original, rows = request.models.original, request.rows.forget
    collator = request.models.collator or default_collator(request.models.processing_class)

    def masks(reference: object) -> np.ndarray:
        return np.concatenate(content_masks(original, rows, collator, reference)).astype(bool)

    labels = np.concatenate([row["labels"] for row in rows]) >= 0
    truth = masks(request.models.retrained)[labels]
    print(f"{len(rows)} rows, {labels.sum()} tokens, {truth.mean():.0%} of them content")
    for name, reference in (("checkpoint before fine-tuning", base), ("short context", None)):
        guess = masks(reference)[labels]
        hits = (guess & truth).sum()
        precision, recall = hits / max(guess.sum(), 1), hits / max(truth.sum(), 1)
        print(f"{name}: content {guess.mean():.0%}, precision {precision:.2f}, recall {recall:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
