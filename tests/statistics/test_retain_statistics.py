"""Laws of `RetainStatistics`: sums add and subtract like the rows behind them; damaged files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny as cases
from hf_unlearn.data.row_identity import batch_hashes
from hf_unlearn.errors import OutputError, StatisticsError
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics import serialisation as module
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.decompositions import sent_by_owner
from hf_unlearn.statistics.eigen import eigendecomposition
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics
from hf_unlearn.statistics.serialisation import METADATA, TENSORS


def collect(model: nn.Module, rows: Sequence[cases.Row], **settings: Any) -> RetainStatistics:
    return collect_statistics(model, rows, progress=False, **({"fisher": True} | settings))


def distance(a: RetainStatistics, b: RetainStatistics) -> float:
    """Largest relative distance of any two sums; infinite where anything that is counted differs."""
    counts = [(s.layers, s.positions, s.rows, s.labels, s.data, s.weights) for s in (a, b)]
    if counts[0] != counts[1] or a.fisher_sums.keys() != b.fisher_sums.keys():
        return float("inf")
    pairs = [(a.gram_sums[k], v) for k, v in b.gram_sums.items()] + [
        (a.fisher_sums[k], v) for k, v in b.fisher_sums.items()
    ]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return cases.tiny_llama().double()


@pytest.fixture(scope="module")
def forget(llama: nn.Module) -> RetainStatistics:
    return collect(llama, cases.text_rows(7)[:3])


@pytest.fixture(scope="module")
def retain(llama: nn.Module) -> RetainStatistics:
    return collect(llama, cases.text_rows(7)[3:])


@pytest.fixture(scope="module")
def full(llama: nn.Module) -> RetainStatistics:
    return collect(llama, cases.text_rows(7), batch_size=4)


def test_subtracting_and_adding_again_gives_the_same(full: RetainStatistics, forget: RetainStatistics) -> None:
    assert distance(full - forget + forget, full) < 1e-12
    assert distance(full - forget, full) == float("inf")


def test_a_sum_equals_one_pass_over_both(
    full: RetainStatistics, forget: RetainStatistics, retain: RetainStatistics
) -> None:
    assert distance(forget + retain, full) < 1e-5  # float32 logits in the Fisher; the Grams alone:
    assert distance(replace(forget + retain, fisher_sums={}), replace(full, fisher_sums={})) < 1e-12


def test_full_minus_forget_equals_the_retain_pass(
    full: RetainStatistics, forget: RetainStatistics, retain: RetainStatistics
) -> None:
    assert distance(full - forget, retain) < 1e-5
    assert distance(replace(full - forget, fisher_sums={}), replace(retain, fisher_sums={})) < 1e-12
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close((full - forget).gram(name), retain.gram(name))  # means, too: the counts are right
    assert (full.gram(name) - retain.gram(name)).norm() > 0.01 * retain.gram(name).norm()


def test_subtraction_needs_the_same_sampled_labels(llama: nn.Module, full: RetainStatistics) -> None:
    """The control: rows with other label positions leave another Fisher and another count."""
    other = collect(llama, cases.text_rows(7, prompt=3)[:3])
    retain = collect(llama, cases.text_rows(7)[3:])
    assert (full - other).labels != retain.labels


def test_operands_are_not_changed(full: RetainStatistics, forget: RetainStatistics) -> None:
    before = {k: v.clone() for k, v in full.gram_sums.items()}
    full - forget, full + forget
    assert all(torch.equal(before[k], v) for k, v in full.gram_sums.items())


def test_the_data_fingerprint_ignores_order_and_adds_up(llama: nn.Module, full: RetainStatistics) -> None:
    rows = cases.text_rows(7)
    for batch_size in (1, 3):
        assert collect(llama, rows[::-1], fisher=False, batch_size=batch_size).data == full.data
    parts = [collect(llama, part, fisher=False) for part in (rows[5:], rows[:5])]
    assert (parts[0] + parts[1]).data == full.data
    assert int((parts[0] - parts[0]).data, 16) == 0
    changed = [*rows[:-1], rows[-1] | {"input_ids": [*rows[-1]["input_ids"][:-1], 28]}]
    assert collect(llama, changed, fisher=False).data != full.data
    assert collect(llama, [*rows, rows[0]], fisher=False).data != full.data  # a row counts as often as it occurs


def test_row_hashes_read_the_unmasked_inputs_only() -> None:
    left, right = (cases.collate(cases.text_rows(3), side) for side in ("left", "right"))
    hashes = [batch_hashes(batch) for batch in (left, right)]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 3
    unmasked = [{"input_ids": batch["input_ids"]} for batch in (left, right)]
    assert batch_hashes(unmasked[0]) != batch_hashes(unmasked[1])


def test_the_weights_fingerprint_names_values_not_their_precision() -> None:
    model = cases.tiny_llama().bfloat16()
    seen = weights_fingerprint(model)
    assert weights_fingerprint(model.float()) == seen
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    assert weights_fingerprint(model) != seen


def test_the_weights_fingerprint_reads_buffers_and_ties_once() -> None:
    model = nn.BatchNorm1d(3)
    seen = weights_fingerprint(model)
    model.running_mean += 1
    assert weights_fingerprint(model) != seen


def test_saved_and_loaded_is_equal_to_the_bit(
    tmp_path: Path, llama: nn.Module, full: RetainStatistics, forget: RetainStatistics
) -> None:
    difference = full - forget
    loaded = RetainStatistics.from_pretrained(difference.save_pretrained(tmp_path / "s"), model=llama)
    for ours, theirs in ((loaded.gram_sums, difference.gram_sums), (loaded.fisher_sums, difference.fisher_sums)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == torch.float64 for k in ours)
    names = ("layers", "positions", "rows", "labels", "weights", "data", "settings", "versions")
    assert all(getattr(loaded, name) == getattr(difference, name) for name in names)
    assert list(loaded.layers) == list(difference.layers)
    assert loaded.summary() == difference.summary()
    assert distance(loaded + forget, full) < 1e-12


@pytest.fixture
def saved(tmp_path: Path, mlp: RetainStatistics) -> Path:
    return mlp.save_pretrained(tmp_path / "statistics")


@pytest.fixture(scope="module")
def mlp() -> RetainStatistics:
    return collect(cases.tiny_mlp(), cases.vector_rows(5))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("moment", ["tensors", "metadata"])
def test_a_failing_write_leaves_the_old_folder(
    saved: Path, mlp: RetainStatistics, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = content(saved)

    def half(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    def no_json(path: Path, value: Any) -> None:
        path.write_text("{")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, *(("save_file", half) if moment == "tensors" else ("write_json", no_json)))
        with pytest.raises(OSError, match="no space"):
            (mlp + mlp).save_pretrained(saved, overwrite=True)
        with pytest.raises(OSError, match="no space"):
            mlp.save_pretrained(saved.parent / "new")
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # neither a new folder nor a partial one
    (mlp + mlp).save_pretrained(saved, overwrite=True)  # control: without the failure it is replaced
    assert content(saved) != before
    assert RetainStatistics.from_pretrained(saved).rows == 10


def test_a_folder_is_replaced_only_with_overwrite(saved: Path, mlp: RetainStatistics) -> None:
    with pytest.raises(OutputError, match="not empty"):
        mlp.save_pretrained(saved)


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def truncate(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def alter(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (truncate, "checksum"),
    "an altered byte": (alter, "checksum"),
    "an empty tensor file": (lambda f: (f / TENSORS).write_bytes(b""), "checksum"),
    "a newer format": (lambda f: edit(f / METADATA, lambda c: c.update(format_version=99)), "format 99, newer"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"{TENSORS} is missing"),
    "no metadata": (lambda f: (f / METADATA).unlink(), f"{METADATA} is missing"),
    "truncated metadata": (lambda f: (f / METADATA).write_text('{"format_version": 1,'), "cannot be read"),
    "metadata of another kind": (lambda f: edit(f / METADATA, lambda c: [1]), "cannot be read"),
    "metadata of no text": (lambda f: (f / METADATA).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "metadata without a version": (
        lambda f: edit(f / METADATA, lambda c: c.pop("format_version") and None),
        "cannot be",
    ),
    "metadata with a strange version": (
        lambda f: edit(f / METADATA, lambda c: c.update(format_version="x")),
        "cannot be",
    ),
    "metadata without a checksum": (lambda f: edit(f / METADATA, lambda c: c.pop("sha256") and None), "cannot be read"),
    "metadata without the rows": (lambda f: edit(f / METADATA, lambda c: c.pop("rows") and None), "cannot be read"),
    "metadata with a strange layer": (
        lambda f: edit(f / METADATA, lambda c: c["layers"].update(a={})),
        "cannot be read",
    ),
    "metadata of an unknown Gram": (
        lambda f: edit(f / METADATA, lambda c: c["layers"]["first"].update(inputs="third")),
        "cannot be read",
    ),
    "no folder": (shutil.rmtree, "neither a local folder nor a Hub id"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(saved: Path, what: str) -> None:
    damage, seen = DAMAGE[what]
    RetainStatistics.from_pretrained(saved)  # control: it can be read before
    damage(saved)
    with pytest.raises(StatisticsError, match=seen) as caught:
        RetainStatistics.from_pretrained(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        (cases.tiny_mlp(width=9), "first as 8 x 6, which is 9 x 6 in MLP"),
        (cases.tiny_mlp(inputs=7), "first as 8 x 6, which is 8 x 7 in MLP"),
        (nn.Sequential(nn.Linear(6, 8)), "which does not exist in Sequential"),
        (cases.tiny_mlp(seed=1), "other weights"),
    ],
)
def test_statistics_of_another_model_are_refused(saved: Path, model: nn.Module, seen: str) -> None:
    RetainStatistics.from_pretrained(saved, model=cases.tiny_mlp())
    with pytest.raises(StatisticsError, match=seen) as caught:
        RetainStatistics.from_pretrained(saved, model=model)
    assert "\n" not in str(caught.value)


def test_other_weights_of_the_same_shapes_can_be_allowed(saved: Path) -> None:
    assert RetainStatistics.from_pretrained(saved, model=cases.tiny_mlp(seed=1), allow_other_weights=True).rows == 5
    with pytest.raises(StatisticsError, match="another model"):  # but never other shapes
        RetainStatistics.from_pretrained(saved, model=cases.tiny_mlp(width=9), allow_other_weights=True)


def test_one_moved_weight_is_another_model(mlp: RetainStatistics) -> None:
    model = cases.tiny_mlp()
    mlp.check_model(model)
    with torch.no_grad():
        model.second.bias[0] += 1e-3
    with pytest.raises(StatisticsError, match="other weights"):
        mlp.check_model(model)


def test_only_statistics_of_the_same_kind_combine(mlp: RetainStatistics) -> None:
    rows = cases.vector_rows(2)
    model = cases.tiny_mlp()
    with pytest.raises(StatisticsError, match="1 differ, first 'second'"):
        mlp - collect(model, rows, layers=["first"])
    with pytest.raises(StatisticsError, match="different layers cannot be combined: 1 differ, first 'first'"):
        mlp + collect(cases.tiny_mlp(width=9), rows)
    with pytest.raises(StatisticsError, match="different weights"):
        mlp - collect(cases.tiny_mlp(seed=1), rows)
    with pytest.raises(StatisticsError, match="only one of the two"):
        mlp - collect(model, rows, fisher=False)
    with pytest.raises(StatisticsError, match="cannot subtract statistics of 6 rows from those of 5 rows"):
        mlp - collect(model, cases.vector_rows(6))
    with pytest.raises(TypeError):
        mlp + 1
    assert (mlp - collect(model, rows)).rows == 3


def test_a_layer_without_a_fisher_says_so() -> None:
    with pytest.raises(StatisticsError, match="first has no Fisher; collect the statistics with fisher=True"):
        collect(cases.tiny_mlp(), cases.vector_rows(2), fisher=False).fisher("first")


def test_printing_statistics_is_one_line_without_tensors(full: RetainStatistics) -> None:
    assert repr(full) == (
        f"RetainStatistics(rows=7, layers=14, grams=8, fishers=14, weights={full.weights[:12]!r}, "
        f"data={full.data[:12]!r})"
    )


def test_the_summary_has_a_line_for_each_gram(full: RetainStatistics) -> None:
    lines = full.summary().splitlines()
    assert lines[0].startswith("7 rows, 14 layers, 8 Grams, 14 Fishers")
    assert [line.split()[0] for line in lines[2:]] == list(full.gram_sums)
    assert "(+2)" in lines[2] and "(+1)" in lines[4] and "(+" not in lines[3] + lines[5]
    n = sum(len(row["input_ids"]) for row in cases.text_rows(7))
    assert f" 48 {n:>9} " in lines[5]


def test_the_summary_shows_what_a_subtraction_of_foreign_rows_leaves(
    llama: nn.Module, full: RetainStatistics, forget: RetainStatistics
) -> None:
    def shares(statistics: RetainStatistics) -> list[float]:
        return [float(line.split()[-1]) for line in statistics.summary().splitlines()[2:]]

    foreign = collect(llama, cases.text_rows(3, seed=9))
    assert min(shares(full - foreign)) > 1e-3
    assert max(shares(full - forget)) < 1e-12
    assert max(shares(full)) < 1e-12


@pytest.mark.parametrize("wide", [40, 300])
def test_a_process_receives_the_decomposition_that_another_one_computed(
    wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thin or full: process 1 receives, tensor by tensor, what process 0 sent."""
    rows_NI = torch.randn(9, wide, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = RetainStatistics(
        {"a": rows_NI.T @ rows_NI}, {}, {"a": LayerSums("a", 4, False)}, {"a": 9}, 9, 0, weights="0", data="0"
    )
    sent: list[Tensor] = []
    own = eigendecomposition(statistics.gram("a"), 9).rounded()
    monkeypatch.setattr("hf_unlearn.statistics.decompositions.world", lambda: (0, 2))
    monkeypatch.setattr("hf_unlearn.statistics.decompositions.from_owner", lambda tensors, owner: sent.extend(tensors))
    sent_by_owner(own, (wide, wide), 0)

    def receive(tensors: list[Tensor], owner: int) -> None:
        for tensor in tensors:
            assert tensor.shape == sent[0].shape and tensor.dtype == sent[0].dtype
            tensor.copy_(sent.pop(0))

    monkeypatch.setattr("hf_unlearn.statistics.decompositions.from_owner", receive)
    received = sent_by_owner(None, (wide, wide), 0)
    assert sent == []
    assert torch.equal(received.values_I, own.values_I) and torch.equal(received.vectors_II, own.vectors_II)
    assert (received.missed is None) == (own.missed is None) == (wide == 40)
