"""Laws of content: masks and scores equal a dense float64 twin, a mask is made of the original model once, and answers
are judged by what they say of the row. Each law has a negative control."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from helpers import model_kinds as kinds
from helpers import reference_losses as twin
from helpers.questions import letters, questions
from helpers.texts import tokenizer as words
from helpers.tiny import (
    collate,
    requires_asset,
    sharpen,
    text_class_rows,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
)
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.left_out import CutRow, LeftOut
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.content import (
    SUBSTITUTES,
    THRESHOLD,
    ContentScores,
    add_content,
    content_masks,
    content_record,
    has_content_rows,
    label_losses,
    score_content,
    score_content_predictions,
    short_context_losses,
    with_content,
)
from hf_unlearn.evaluation.evaluate import evaluate_unlearning, training_metrics
from hf_unlearn.evaluation.greedy import content_phrases, greedy_reveals, has_phrase, question, revealed, with_phrases
from hf_unlearn.evaluation.metrics.registry import CONTENT
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.forward import Predictions, output_logits
from hf_unlearn.models.short_context import CONTEXT
from hf_unlearn.publishing.card import render_card

Rows = list[dict[str, Any]]


def sharp_llama(seed: int = 0) -> Any:
    """A model whose predictions depend much on the context."""
    return sharpen(tiny_llama(seed), 2.0)


def sharp_gpt2() -> Any:
    return sharpen(tiny_gpt2(), 4.0)


def known_rows(make: Any, n: int) -> Rows:
    """Rows whose answers are what a model itself says, but for every fourth token."""
    model, rows = make(), text_rows(n, lengths=(14, 9, 16, 11), prompt=5)
    for row in rows:
        for place in range(5, len(row["labels"])):
            if place % 4:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([row["input_ids"][:place]])).logits
                row["input_ids"][place] = row["labels"][place] = int(logits[0, -1].argmax())
    return rows


MAKERS: dict[str, tuple[Any, Any]] = {
    "gpt2": (sharp_gpt2, lambda n: known_rows(sharp_gpt2, n)),
    "llama": (sharp_llama, lambda n: known_rows(sharp_llama, n)),
    "T5": (kinds.KINDS["T5"][0], kinds.pair_rows),
}


def other(name: str) -> Any:
    """A model of the same kind with other weights."""
    model = MAKERS[name][0]()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def dense_losses(model: Any, row: dict[str, Any]) -> dict[int, float]:
    """The loss of each label by its place: the row alone, float64."""
    batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        logits = output_logits(model, batch)[0].double().numpy()
    shift = 0 if model.config.is_encoder_decoder else 1
    labels = row["labels"]
    return {t: twin.nll(logits[t - shift], labels[t]) for t in range(shift, len(labels)) if labels[t] >= 0}


def dense_short_losses(model: Any, row: dict[str, Any]) -> dict[int, float]:
    """The same, each label from the last tokens before it alone."""
    losses = {}
    for place in dense_losses(model, row):
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *row["labels"]][: place + 1][-CONTEXT:]
            batch = {"input_ids": [row["input_ids"][-CONTEXT:]], "decoder_input_ids": [start]}
        else:
            begins = row["input_ids"][0] == model.config.bos_token_id and place > CONTEXT
            before = row["input_ids"][max(0, place - CONTEXT) : place]
            batch = {"input_ids": [row["input_ids"][:begins] + before]}
        with torch.no_grad():
            logits = model(**{name: torch.tensor(value) for name, value in batch.items()}).logits[0, -1]
        losses[place] = twin.nll(logits.double().numpy(), row["labels"][place])
    return losses


def dense_mask(row: dict[str, Any], ours: dict[int, float], theirs: dict[int, float]) -> list[int]:
    return [int(t in ours and theirs[t] - ours[t] > THRESHOLD) for t in range(len(row["labels"]))]


# Masks


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rule", SUBSTITUTES)
@pytest.mark.parametrize("name", MAKERS)
def test_masks_equal_their_twin(name: str, rule: str, side: str) -> None:
    if name != "llama" and side == "left":
        pytest.skip("of these, only the positions of llama do not depend on padding")
    model, rows = MAKERS[name][0](), MAKERS[name][1](6)
    reference = other(name) if rule == "reference" else None
    found = content_masks(model, rows, PaddingCollator(side=side), reference, batch_size=4)
    ours = [dense_losses(model, row) for row in rows]
    theirs = [dense_short_losses(model, row) if reference is None else dense_losses(reference, row) for row in rows]
    assert found == [dense_mask(*parts) for parts in zip(rows, ours, theirs, strict=True)]
    assert any(map(any, found)) and not all(map(all, found))
    unseen = content_masks(model, rows, PaddingCollator(side=side), reference, seen=False)
    zeros = [dict.fromkeys(loss, 0.0) for loss in ours]
    assert unseen == [dense_mask(*parts) for parts in zip(rows, zeros, theirs, strict=True)]
    assert unseen != found
    assert content_masks(model, rows, PaddingCollator(), model) == [[0] * len(row["labels"]) for row in rows]


@pytest.mark.parametrize("name", MAKERS)
def test_losses_of_labels_equal_their_twin_row_by_row(name: str) -> None:
    model, rows = MAKERS[name][0](), MAKERS[name][1](5)
    for losses, dense in ((label_losses, dense_losses), (short_context_losses, dense_short_losses)):
        found = losses(model, rows, PaddingCollator(), 2)
        for row, values in zip(rows, found, strict=True):
            np.testing.assert_allclose(values, list(dense(model, row).values()), rtol=1e-4, atol=1e-5)
    short, whole = (np.concatenate(f(model, rows, PaddingCollator(), 2)) for f in (short_context_losses, label_losses))
    assert np.abs(short - whole).max() > 0.1  # negative control: the context matters


def test_the_begin_token_stays_in_a_short_context() -> None:
    model, rows = sharp_llama(), known_rows(sharp_llama, 4)
    begun = [{**row, "input_ids": [0, *row["input_ids"]], "labels": [-100, *row["labels"]]} for row in rows]
    begun = [{name: row[name] for name in ("input_ids", "labels")} for row in begun]
    found = [short_context_losses(model, given, PaddingCollator(), 4) for given in (begun, rows)]
    for row, values in zip(begun, found[0], strict=True):
        np.testing.assert_allclose(values, list(dense_short_losses(model, row).values()), rtol=1e-4, atol=1e-5)
    assert np.abs(np.concatenate(found[0]) - np.concatenate(found[1])).max() > 0.1  # negative control


def test_masks_do_not_depend_on_how_rows_are_padded_or_batched() -> None:
    model, rows = tiny_llama(), text_rows(5)
    expected = content_masks(model, rows, PaddingCollator(), other("llama"))
    for batch_size in (1, 2, 16):
        assert content_masks(model, rows, PaddingCollator(), other("llama"), batch_size=batch_size) == expected
    padded = [
        {
            "input_ids": [*row["input_ids"], 0, 0],
            "attention_mask": [*row["attention_mask"], 0, 0],
            "labels": [*row["labels"], 0, 0],
        }
        for row in rows
    ]
    for reference in (other("llama"), None):
        plain = content_masks(model, rows, PaddingCollator(), reference)
        assert content_masks(model, padded, PaddingCollator(), reference) == [[*mask, 0, 0] for mask in plain]
    theirs = DataCollatorForSeq2Seq(words(None))
    assert content_masks(model, rows, theirs, other("llama")) == expected


def test_a_given_mask_is_kept_and_the_rows_are_not_changed() -> None:
    rows = known_rows(sharp_llama, 3)
    given = [0, 0, 1, *[0] * (len(rows[1]["labels"]) - 3)]
    rows[1]["content_mask"] = given
    before = [dict(row) for row in rows]
    masks = content_masks(sharp_llama(), rows, PaddingCollator())
    assert masks[1] == given and any(masks[0] + masks[2])
    marked = with_content(rows, masks)
    assert rows == before and [row["content_mask"] for row in marked] == masks
    assert content_record(marked)["rules"] == {"secret": 1, "short context": 2}
    assert content_record(with_content(rows, masks, other("llama")))["rules"] == {"reference": 2, "secret": 1}
    assert content_masks(tiny_llama(1), marked, PaddingCollator()) == masks  # of the original, once
    assert content_masks(sharp_llama(1), before, PaddingCollator()) != masks  # negative control
    with pytest.raises(DataError, match="row 0 has 14 labels and 2 content_mask"):
        content_masks(tiny_llama(), [{**rows[0], "content_mask": [0, 1]}], PaddingCollator())


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(SettingsError, match="has 64 token embeddings and the model 29; pass the checkpoint that was"):
        content_masks(
            tiny_llama(), text_rows(1), PaddingCollator(), LlamaForCausalLM(LlamaConfig(vocab_size=64, **small))
        )


def test_only_answers_have_content() -> None:
    assert has_content_rows(tiny_llama(), text_rows(1)) and has_content_rows(kinds.KINDS["T5"][0](), kinds.pair_rows(1))
    assert not has_content_rows(tiny_bert(), text_class_rows(1))
    assert not has_content_rows(tiny_mlp(), [{"pixel_values": torch.zeros(6), "labels": 1}])
    splits = {"forget": text_class_rows(2), "holdout": text_class_rows(2, 1)}
    assert add_content(splits, tiny_bert(), PaddingCollator()) == splits


def test_a_row_that_was_cut_stays_a_row_that_was_cut() -> None:
    rows = [CutRow(row, left_out=4) for row in text_rows(2)]
    marked = with_phrases(with_content(rows, content_masks(tiny_llama(), rows, PaddingCollator())), letters())
    assert LeftOut.of(marked) == LeftOut.of(rows) == LeftOut(2, 8, 2)


# Scores


@pytest.mark.parametrize(("name", "side"), [("gpt2", "right"), ("llama", "right"), ("llama", "left")])
def test_scores_equal_their_twin(name: str, side: str) -> None:
    model, plain = MAKERS[name][0](), MAKERS[name][1](6)
    rows = list(with_content(plain, content_masks(model, plain, PaddingCollator(), other(name))))
    rows[0] = {**rows[0], "content_mask": [0] * len(rows[0]["labels"])}
    scores = score_content(model, rows, PaddingCollator(side=side), batch_size=4)
    for number, row in enumerate(rows):
        losses = dense_losses(model, row)
        content = [losses[t] for t in losses if row["content_mask"][t]]
        function = [losses[t] for t in losses if not row["content_mask"][t]]
        means = [np.mean(part) if part else math.nan for part in (content, function)]
        known = np.mean([math.exp(-loss) > 0.5 for loss in content]) if content else math.nan
        expected = [*means, known, len(content), len(function)]
        found = [getattr(scores, field.name)[number] for field in fields(ContentScores)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert math.isnan(scores.content_loss[0]) and scores.content_tokens[0] == 0 and scores.content_tokens.max() > 0
    both = scores.content_tokens + scores.function_tokens
    total = np.nan_to_num(scores.content_loss) * scores.content_tokens
    total += np.nan_to_num(scores.function_loss) * scores.function_tokens
    np.testing.assert_allclose(total / both, score_rows(model, rows, PaddingCollator()).loss, rtol=1e-5)
    turned = [{**row, "content_mask": [1 - value for value in row["content_mask"]]} for row in rows]
    swapped = score_content(model, turned, PaddingCollator(side=side))
    np.testing.assert_allclose(swapped.content_loss, scores.function_loss, rtol=1e-5)
    assert not np.allclose(swapped.content_loss[1:], scores.content_loss[1:], equal_nan=True)  # negative control


def test_a_broken_number_is_not_taken_for_a_row_without_content() -> None:
    logits, labels, rows = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
    logits[0, 0] = math.nan
    broken = score_content_predictions(Predictions(logits, labels, rows, 2, content_L=torch.tensor([True, True])))
    assert broken[0, [0, 2]].isnan().all() and broken[0, 3] == 1 and not broken[1, [0, 2]].isnan().any()
    with pytest.raises(DataError, match="no column 'content_mask'"):
        score_content_predictions(Predictions(logits, labels, rows, 2))


# Reports


def splits() -> dict[str, Rows]:
    return {"forget": text_rows(5), "retain": text_rows(3, 2), "holdout": text_rows(4, 1)}


@pytest.mark.parametrize("rule", SUBSTITUTES)
def test_every_model_is_measured_by_the_masks_of_the_original(rule: str) -> None:
    models = {"original": sharp_llama(), "unlearned": sharp_llama(1), "retrained": sharp_llama(2)}
    reference = other("llama") if rule == "reference" else None
    sets = {**splits(), "forget": known_rows(sharp_llama, 5)}
    report = evaluate_unlearning(
        models["unlearned"],
        sets,
        original=models["original"],
        retrained=models["retrained"],
        reference=reference,
        batch_size=2,
    )
    for split in ("forget", "holdout"):
        rows = sets[split]
        seen = split == "forget"
        masks = content_masks(models["original"], rows, PaddingCollator(), reference, seen=seen)
        assert report.content_counts[split] == content_record(with_content(rows, masks, reference))
        assert report.content_counts[split]["rules"] == {rule: len(rows)}
        for kind, model in models.items():
            scores = score_content(model, with_content(rows, masks), PaddingCollator())
            for name in ("content_loss", "content_known", "function_loss"):
                values = getattr(scores, name)
                values = values[~np.isnan(values)]
                found = report.get(name, split, kind)
                assert found is not None and found.n == len(values)
                assert found.value == pytest.approx(values.mean() if len(values) else math.nan, rel=1e-5, nan_ok=True)
                assert (found.low is not None) == bool(len(values)) == (not found.reason)
    assert report.get("content_loss", "retain") is None and "retain" not in report.content_counts
    own = content_masks(models["unlearned"], sets["forget"], PaddingCollator(), reference)
    masks = content_masks(models["original"], sets["forget"], PaddingCollator(), reference)
    assert own != masks  # negative control: the masks of the unlearned model are others
    assert f"rule: {rule}" in report.table()


def test_content_is_measured_where_it_can_be() -> None:
    def measured(model: Any, rows: Any, **options: Any) -> set[str]:
        return {m.name for m in evaluate_unlearning(model, rows, **options).metrics} & set(CONTENT)

    three = set(CONTENT) - {"greedy_reveals"}
    assert measured(tiny_llama(1), splits(), original=tiny_llama()) == three
    assert measured(tiny_llama(1), splits(), original=tiny_llama(), processing_class=words(None)) == set(CONTENT)
    assert measured(tiny_llama(1), splits()) == set()
    assert measured(tiny_llama(1), splits(), original=tiny_llama(), metrics=["loss"]) == set()
    assert measured(tiny_llama(1), splits(), original=tiny_llama(), metrics=["content_known"]) == {"content_known"}
    assert measured(tiny_llama(1), splits(), original=tiny_llama(), metrics="default") == three
    named = [{**row, "content_mask": [0, 0, *[1] * (len(row["labels"]) - 2)]} for row in text_rows(3)]
    assert measured(tiny_llama(1), {"forget": named}) == three
    t5 = kinds.KINDS["T5"][0]
    assert measured(t5(), {"forget": kinds.pair_rows(3)}, original=t5(), processing_class=words(None)) == three
    bert = text_class_rows(3)
    assert measured(tiny_bert(), {"forget": bert}, original=tiny_bert(1)) == set()
    for name in CONTENT:
        with pytest.raises(DataError, match="no row says so; pass the original model, or name what is to be forgotten"):
            measured(tiny_llama(), splits(), metrics=[name])


def test_metrics_during_training_take_named_secrets() -> None:
    named = [{**row, "content_mask": [0, 0, *[1] * (len(row["labels"]) - 2)]} for row in text_rows(3)]
    found = training_metrics({"forget": named}, ["content_loss"])(tiny_llama())
    assert found["forget_content_loss"] == pytest.approx(score_rows(tiny_llama(), named, PaddingCollator()).loss.mean())


def test_a_cached_number_is_that_of_its_mask(tmp_path: Any) -> None:
    def value(mask: list[int]) -> float:
        rows = [{**row, "content_mask": (mask + [0] * 20)[: len(row["labels"])]} for row in text_rows(3)]
        found = evaluate_unlearning(tiny_llama(), {"forget": rows}, cache_dir=tmp_path).get("content_loss", "forget")
        assert found is not None
        return found.value

    one, two = value([0, 0, 1]), value([0, 0, 0, 1])
    assert one != two and value([0, 0, 1]) == one


def test_a_collator_of_transformers_gives_the_same_report() -> None:
    rows, tokenizer = splits(), words(None)
    reports = [
        evaluate_unlearning(tiny_llama(1), rows, original=tiny_llama(), collator=collator)
        for collator in (PaddingCollator(pad_token_id=1), DataCollatorForSeq2Seq(tokenizer))
    ]
    mine, theirs = (
        [(m.name, m.split, m.model, pytest.approx(m.value, abs=1e-5, nan_ok=True)) for m in r.metrics] for r in reports
    )
    assert mine == theirs


# Greedy answers


def forget_rows(secret: bool = False) -> Rows:
    own = {"secret": "in Ulm"} if secret else {}
    return [
        dict(row) for row in encode_dataset([{"prompt": "where ?", "completion": " Ann live in Ulm .", **own}], words())
    ]


def masked(text: str, prompt: str, content: list[str]) -> dict[str, Any]:
    """A row of words whose mask is on `content`."""
    (row,) = encode_dataset([{"prompt": prompt, "completion": f" {text}"}], words(None))
    names = words(None).convert_ids_to_tokens(row["input_ids"])
    is_answer = [label != -100 for label in row["labels"]]
    return {**row, "content_mask": [int(a and n in content) for a, n in zip(is_answer, names, strict=True)]}


def test_phrases_are_the_words_of_the_content() -> None:
    row = masked("Ann live in Ulm .", "where does", ["live", "Ulm", ".", "</s>"])
    assert content_phrases(row, words(None)) == ["live", "Ulm"]
    assert content_phrases(masked("live in Ulm", "where", ["live", "in", "Ulm"]), words(None)) == ["live in Ulm"]
    assert content_phrases(row, words(None), common={"live"}) == ["Ulm"]
    assert content_phrases(masked("live in Ulm", "where Ulm", ["live", "Ulm"]), words(None)) == [
        "live"
    ]  # not the prompt's
    assert content_phrases(masked("live in Ulm", "where", ["in"]), words(None)) == []  # says nothing
    assert content_phrases(masked("live in Ulm", "where", []), words(None)) == []
    (named,) = forget_rows(secret=True)
    assert content_phrases(named, words()) == ["in Ulm"]
    (marked,) = with_phrases([row], words(None), [masked("Bonn live .", "where", [])])
    assert marked["content_phrases"] == ["Ulm"] and "content_phrases" not in row


def test_a_part_of_a_word_stands_for_the_word() -> None:
    (row,) = encode_dataset([{"prompt": "who", "completion": " ada brown fox"}], letters())
    places = [place for place, token in enumerate(row["labels"]) if token == letters().encode("w")[0]]
    row["content_mask"] = [int(place == places[0]) for place in range(len(row["labels"]))]
    assert content_phrases(row, letters()) == ["brown"]


@pytest.mark.parametrize(
    ("answer", "phrase", "anywhere", "expected"),
    [
        ("She lives in ULM.", "Ulm", False, True),
        ("She lives in Ulmer Weg.", "Ulm", False, False),
        ("She lives in Ulmer Weg.", "Ulm", True, True),
        ("Jaime\n Vasquez wrote it", "jaime vasquez", False, True),
        ("Jaime Gonzalez wrote it", "jaime vasquez", False, False),
        ("他住在北京市", "北京", False, True),
        ("Ulmer, Ulm", "Ulm", False, True),
    ],
)
def test_a_phrase_is_found_as_words(answer: str, phrase: str, anywhere: bool, expected: bool) -> None:
    assert has_phrase(answer, phrase, anywhere) == expected
    assert bool(revealed({"secret": [phrase]} if anywhere else {}, answer, [phrase])) == expected


def test_a_text_without_a_prompt_is_continued_from_its_first_content() -> None:
    (row,) = encode_dataset([{"text": "Ann live in Ulm .", "secret": "Ulm"}], words(None))
    asked = question(row)
    assert asked is not None and words(None).convert_ids_to_tokens(asked["input_ids"]) == [
        *"Ann live in Ulm .".split(),
        "</s>",
    ]
    assert [label == -100 for label in asked["labels"]] == [True] * 3 + [False] * 3
    chat = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "in Ulm ."}]
    (row,) = encode_dataset(
        [{"messages": [*chat, *chat[:1], {"role": "assistant", "content": "in Rome ."}], "secret": "Ulm"}], words()
    )
    asked = question(row)  # up to the end of the answer with the secret
    assert asked is not None and words().convert_ids_to_tokens(asked["input_ids"])[-4:] == ["in", "Ulm", ".", "<end>"]
    assert question({**row, "content_mask": [0] * len(row["labels"])}) is None


class Says:
    """Stands for greedy decoding: every model says this."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str):
        self.asked: list[Rows] = []

        def generate(model: Any, rows: Rows, *options: Any) -> list[str]:
            self.asked.append(rows)
            return list(answers)[: len(rows)]

        monkeypatch.setattr("hf_unlearn.evaluation.greedy.generate_answers", generate)


def test_revealed_rows_are_counted_and_others_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        masked("live in Ulm", "where", ["Ulm"]),
        masked("live in Ulm", "where", []),
        masked("live in Bonn", "where", ["Bonn"]),
        masked("Ann " * 40 + "Bonn", "where " * 40, ["Bonn"]),  # its prompt fills the context
    ]
    says = Says(monkeypatch, "ulm !", "Ulm")
    reveals = greedy_reveals(tiny_gpt2(), rows, words(None))
    np.testing.assert_array_equal(reveals, [1, math.nan, 0, math.nan])
    assert len(says.asked) == 1 and len(says.asked[0]) == 2


def test_a_memorised_answer_gives_itself_away_and_a_relabelled_one_does_not() -> None:
    from hf_unlearn.models.loading import load_model, load_tokenizer

    folder = str(requires_asset("stories260K"))
    tokenizer, base, model = load_tokenizer(folder), load_model(folder), load_model(folder)
    names = {"dog": "Zorro", "cat": "Brutus", "bird": "Maximus", "fish": "Kaiser"}
    raw = [
        {"prompt": f"The {animal} of Lily was called", "completion": f" {name}. It was a good {animal}."}
        for animal, name in names.items()
    ]
    rows = encode_dataset(raw, tokenizer, model=model)
    batch = collate(rows)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    report = evaluate_unlearning(
        model.eval(),
        {"forget": raw, "holdout": [{"prompt": "The rabbit of Tom", "completion": " was good."}]},
        original=model,
        retrained=base,
        reference=base,
        processing_class=tokenizer,
    )
    value = {(m.name, m.model): m.value for m in report.metrics if m.split == "forget"}
    assert value["greedy_reveals", "unlearned"] == 1 and value["greedy_reveals", "retrained"] == 0
    assert value["content_known", "original"] > 0.9 > 0.1 > value["content_known", "retrained"]
    assert value["content_loss", "retrained"] > 4 * value["function_loss", "retrained"]
    marked = with_content(rows, content_masks(model, rows, PaddingCollator(), base))
    for row, name in zip(marked, names.values(), strict=True):
        assert name in " ".join(content_phrases(row, tokenizer))
    secret = [{**row, "secret": name} for row, name in zip(raw, names.values(), strict=True)]
    by_name = evaluate_unlearning(base, {"forget": secret}, processing_class=tokenizer)
    assert by_name.get("greedy_reveals", "forget").value == 0 and by_name.content_counts["forget"]["rules"] == {
        "secret": 4
    }  # type: ignore[union-attr]
    assert report.table().startswith(
        "4 of 4 greedy answers still contain what was to be forgotten (retrained model: 0)\n"
    )


# Table and card


def greedy_report(value: float, status: str = "reached", **others: float) -> UnlearningReport:
    metrics = [MetricValue("greedy_reveals", value, "forget", "unlearned", n=4)]
    metrics += [MetricValue("greedy_reveals", v, "forget", model, n=4) for model, v in others.items()]
    outcome = {"status": status, "summary": f"{status}: forget probability 0.1", "advice": "attack the model"}
    counts = {"forget": {"rows": 4, "tokens": 40, "content_tokens": 9, "rules": {"reference": 4}}}
    return UnlearningReport(metrics, outcome=outcome, content_counts=counts)


def test_table_and_card_say_first_what_is_still_said() -> None:
    line = "2 of 4 greedy answers still contain what was to be forgotten, although the mark was reached"
    report = greedy_report(0.5)
    card = render_card(report, model_name="tiny")
    assert report.table().splitlines()[0] == line
    assert card.index(line) < card.index("**Outcome: reached") and "9 of 40 tokens" in card
    beside = greedy_report(0.5, retrained=0.25).table()
    assert beside.startswith(f"{line} (retrained model: 1)\n")
    missed = greedy_report(0.5, "missed").table()
    assert missed.startswith("2 of 4 greedy answers still contain what was to be forgotten\n")
    for clean in (greedy_report(0.0), greedy_report(math.nan), UnlearningReport()):
        assert "still contain" not in clean.table() + render_card(clean, model_name="tiny")


def test_private_samples_are_never_written(tmp_path: Any) -> None:
    report = UnlearningReport(private_samples=[{"prompt": "where?", "answer": "in Ulm", "after": "?"}])
    report.save(tmp_path)
    assert "Ulm" not in (tmp_path / "unlearning_report.json").read_text() + render_card(report, model_name="tiny")
    report.samples = report.private_samples  # negative control
    report.save(tmp_path)
    assert "Ulm" in (tmp_path / "unlearning_report.json").read_text()


def test_questions_are_judged_under_a_tokenizer_without_offsets() -> None:
    raw = [{k: row[k] for k in ("prompt", "completion")} for row in questions(3)]
    raw = [{**row, "secret": row["completion"][1:4]} for row in raw]
    report = evaluate_unlearning(tiny_llama(), {"forget": raw}, processing_class=letters())
    assert report.content_counts["forget"]["content_tokens"] == 9
    found = report.get("greedy_reveals", "forget")
    assert found is not None and found.n == 3 and found.value == 0
