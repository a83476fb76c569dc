"""Laws of rows that are cut at `max_length`: how many, and how many of their tokens, is known wherever the rows go, and
stands in the table, the report and the card of a run. Negative control: nothing is said of rows that fit."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from helpers.texts import ANSWER, QUESTION, tokenizer
from helpers.tiny import requires_asset, tiny_llama
from hf_unlearn import UnlearningConfig, UnlearningTrainer
from hf_unlearn.cli.answers import reports_answer
from hf_unlearn.data.batches import select, take
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.left_out import CutRow, LeftOut
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion import DeletionRequest, RequestModels, RequestRows, fulfil_request
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.rows import RowEncoding, load_splits
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.loading import load_tokenizer
from hf_unlearn.publishing.card import render_card

SHORT, LONG = {"text": "in Ulm"}, {"text": " ".join(["in"] * 20)}
OTHER = {"text": " ".join(["Bonn"] * 12)}


def encoded(*rows: Any, max_length: int | None = 8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return encode_dataset(list(rows), tokenizer(), max_length=max_length)


def test_the_count_goes_with_the_rows() -> None:
    rows = encoded(SHORT, LONG, OTHER)
    assert rows.left_out == LeftOut(rows=2, tokens=13 + 5, total=3)
    forgotten = row_hash(rows[2])
    filtered = [row for row in rows if row_hash(row) != forgotten]
    assert LeftOut.of(filtered) == LeftOut(1, 13, 2)
    assert LeftOut.of(select(rows, [0, 2])) == LeftOut(1, 5, 2)
    assert LeftOut.of(take(select(rows, [1, 2]), 1)) == LeftOut(1, 13, 1)
    assert LeftOut.of([*rows, *rows]) == LeftOut(4, 36, 6)
    assert LeftOut.of(pickle.loads(pickle.dumps(list(rows)))) == rows.left_out
    assert LeftOut.of(encoded(SHORT, LONG, OTHER, max_length=None)) == LeftOut(0, 0, 3)
    assert rows[1] == dict(rows[1]) and isinstance(rows[1], CutRow)


def test_other_answers_of_a_row_count_with_it() -> None:
    row = {"question": QUESTION, "answer": ANSWER, "perturbed_answer": [" ".join(["Ulm"] * 20)]}
    whole, rows = encoded(row, max_length=None), encoded(row, max_length=20)
    wrong = whole[0]["alternatives"]["wrong"][0]["input_ids"]
    assert rows.left_out == LeftOut(1, len(wrong) - 20, 1)


def test_a_stream_counts_what_it_cuts_and_warns_once() -> None:
    stream = datasets.Dataset.from_list([SHORT, LONG, OTHER]).to_iterable_dataset()
    rows = encode_dataset(stream, tokenizer(), what="retain", max_length=8, streams=True)
    with pytest.warns(UserWarning, match="2 of 3 rows of the retain set are cut at 8 tokens") as caught:
        for _ in range(2):
            assert len(list(rows)) == 3 and rows.left_out == LeftOut(2, 18, 3)
    assert len(caught) == 1
    few = take(rows, 2)
    with pytest.warns(UserWarning, match="1 of 2 rows of the retain set"):
        assert len(list(few)) == 2 and few.left_out == LeftOut(1, 13, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(encode_dataset(stream, tokenizer(), max_length=30, streams=True))


def test_images_are_counted_without_being_read() -> None:
    class Images:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

    assert LeftOut.of(Images()) == LeftOut(total=3)
    assert LeftOut.of(select(Images(), [0, 1])) == LeftOut(total=2)


def card_line(report: UnlearningReport) -> str:
    (line,) = [line for line in render_card(report, model_name="model").splitlines() if line.startswith("| rows cut")]
    return line.split("|")[2].strip()


def settings(folder: Path, **changes: Any) -> UnlearningConfig:
    given = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "eval_strategy": "no", **changes}
    return UnlearningConfig(str(folder), **given)


def test_a_trainer_reports_what_was_cut(tmp_path: Path) -> None:
    sets = ([LONG, SHORT], [OTHER, {"text": "in Rome"}])
    for max_length, forget, retain in ((8, (1, 13), (1, 5)), (None, (0, 0), (0, 0))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            trainer = UnlearningTrainer(
                tiny_llama(), settings(tmp_path, max_length=max_length), *sets, processing_class=tokenizer()
            )
        trainer.train()
        report = trainer.report()
        counts = [{"rows": 2, "rows_cut": rows, "tokens_cut": tokens} for rows, tokens in (forget, retain)]
        assert report.data == {"forget": counts[0], "retain": counts[1]}
        expected = "forget: 1 of 2 rows (13 tokens); retain: 1 of 2 rows (5 tokens)" if max_length else "none"
        assert card_line(report) == expected
        assert ("1 of 2 forget rows were cut at max_length, 13 tokens were not read" in report.table()) == bool(
            max_length
        )
    assert card_line(UnlearningReport()) == "not recorded"


def test_a_request_reports_what_was_cut(tmp_path: Path) -> None:
    forget, retain = encoded(LONG, SHORT), encoded(OTHER, {"text": "in Rome"})
    request = DeletionRequest(
        models=RequestModels(original=tiny_llama(), processing_class=tokenizer()),
        rows=RequestRows(forget=forget, evaluation={"retain": select(retain, [1])}, retain=retain),
    )
    report = fulfil_request(request, settings(tmp_path / "made", constraint="none", loss="grad_diff"))
    saved = UnlearningReport.load(tmp_path / "made")
    assert saved.data == report.data
    assert report.data["forget"] == {"rows": 2, "rows_cut": 1, "tokens_cut": 13}
    assert report.data["retain"] == {"rows": 2, "rows_cut": 1, "tokens_cut": 5}
    card = (tmp_path / "made" / "README.md").read_text()
    assert "forget: 1 of 2 rows (13 tokens); retain: 1 of 2 rows (5 tokens)" in card
    shown = reports_answer({"none": report}, str(tmp_path), "answer_probability").text
    assert "1 of 2 retain rows were cut at max_length, 5 tokens were not read" in shown


def test_rows_of_earlier_requests_do_not_count_with_the_others() -> None:
    data, model = requires_asset("tofu/full.json").parent, requires_asset("stories260K")
    args = RunArguments(dataset_name=str(data), train="full[0:12]", forget="full[0:2]")
    words, encoding = load_tokenizer(str(model)), RowEncoding(task="language-model", max_length=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        earlier = {"forgotten_1": encode_dataset(_rows(args, 2, 6), words, max_length=100)}
        first, second = load_splits(args, words, encoding), load_splits(args, words, encoding, earlier)
    before, after, gone = (LeftOut.of(rows) for rows in (first.train, second.train, earlier["forgotten_1"]))
    assert gone.rows and after.rows
    assert (after.rows, after.tokens, after.total) == (before.rows - gone.rows, before.tokens - gone.tokens, 8)
    retain = LeftOut.of(second.evaluation["retain"])
    assert retain.tokens == after.tokens - LeftOut.of(second.forget).tokens


def _rows(args: RunArguments, start: int, stop: int) -> Any:
    return load_rows(args.dataset_name, f"full[{start}:{stop}]", "earlier")


def test_an_evaluation_records_its_sets() -> None:
    report = evaluate_unlearning(tiny_llama(), {"forget": encoded(LONG, SHORT), "retain": encoded(SHORT)})
    assert report.data["forget"]["tokens_cut"] == 13 and report.data["retain"]["rows_cut"] == 0
    assert np.isfinite(report.metrics[0].value)
