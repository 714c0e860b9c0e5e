import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_prune.calibration import Calibration, Row, RowSet, bypass_units, replay
from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import ArtifactError, CalibrationError
from tests.models import tiny_model, tiny_rows


def calibrated(joint=False, labels=False):
    model = tiny_model(layers=2)
    rows = RowSet.of(
        Row.of(ids, torch.arange(len(ids)) > 3 if labels else None)
        for ids in tiny_rows(24, uneven=True)
    )
    empty = Calibration(
        spec_for(model).fingerprint,
        rows,
        {},
        notes=("said", "in words"),
        weights_digest="of the weights",
    )
    units = bypass_units(DecoderParts(model))
    return empty.with_replay(replay(model, rows, units, joint=joint, target="before_norm"))


@pytest.mark.parametrize("joint", [False, True])
def test_round_trip(tmp_path, joint):
    calibration = calibrated(joint, labels=joint)
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert again.describe() == calibration.describe()
    assert again.model_fingerprint == calibration.model_fingerprint
    assert again.weights_digest == calibration.weights_digest == "of the weights"
    assert again.target == "before_norm"
    for a, b in zip(again.rows.rows, calibration.rows.rows, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.scored, b.scored)
    for key, pair in calibration.units.items():
        assert all(torch.equal(a, b) for a, b in zip(again.units[key], pair, strict=True))
    assert torch.equal(again.full, calibration.full)
    assert list(again.bypassed) == sorted(calibration.bypassed)
    assert list(again.changes) == sorted(calibration.changes)
    for unit, state in calibration.bypassed.items():
        assert torch.equal(again.bypassed[unit], state)
        assert torch.equal(again.changes[unit], calibration.changes[unit])


def test_without_a_replay(tmp_path):
    rows = RowSet.of(map(Row.of, tiny_rows(3)))
    Calibration("abc", rows, {}).save(tmp_path / "x")
    again = Calibration.load(tmp_path / "x")
    assert again.full is None
    assert again.bypassed is None
    assert again.units == {}
    assert again.data_digest == Calibration("other", rows, {}).data_digest


def test_f11_too_little_text_is_refused_with_its_counts():
    rows = RowSet.of(map(Row.of, tiny_rows(2, 10)))
    with pytest.raises(CalibrationError, match=r"20 real tokens in 2 samples .*at least 21 \(min_"):
        Calibration("abc", rows, {}).require(21)
    Calibration("abc", rows, {}).require(20)
    with pytest.raises(CalibrationError, match="0 real tokens in 0 samples"):
        Calibration("abc", RowSet.of([]), {}).require(1)


@pytest.mark.parametrize(
    ("length", "labelled", "message"),
    [
        (10, 0, r"0 of the \d+ real tokens in \d+ samples on the score side can be scored"),
        (10, 1, "is where its label is not -100 and one precedes it"),  # the first of a row
        (1, 1, "Give longer samples, or labels that score some tokens"),
    ],
)
def test_f11_text_that_scores_nothing_is_refused_with_its_counts(length, labelled, message):
    rows = RowSet.of(Row.of(ids, torch.arange(length) < labelled) for ids in tiny_rows(40, length))
    assert rows.num_scored("score") == 0
    with pytest.raises(CalibrationError, match=message):
        Calibration("abc", rows, {}).require(2)


def test_scored_tokens_are_counted_without_the_first_of_a_row():
    ids, labelled = tiny_rows(1, 10)[0], torch.arange(10) % 2 == 0
    assert RowSet.of([Row.of(ids)]).num_scored("score") == 9
    assert RowSet.of([Row.of(ids, labelled)]).num_scored("choose") == 4


def test_a_file_of_before_weights_were_named_is_read_without(tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibrated().save(path)
    damage(path, header={"schema_version": 1}, without="weights_digest")
    assert Calibration.load(path).weights_digest is None


def damage(path, *, header=None, without=None, drop=None, add=None, raw=None):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lit_prune"])
    metadata.pop(without, None)
    if drop:
        tensors = {k: v for k, v in tensors.items() if drop not in k}
    tensors.update(add or {})
    text = raw if raw is not None else json.dumps(metadata | (header or {}))
    save_file(tensors, path, metadata={"lit_prune": text})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"schema_version": 99}}, "has schema_version 99, expected at most 2"),
        ({"header": {"weights_digest": 5}}, "is not a calibration"),
        ({"header": {"model_fingerprint": 3}}, "is not a calibration"),
        ({"header": {"notes": [1]}}, "is not a calibration"),
        ({"header": {"notes": 7}}, "is not a calibration"),
        ({"raw": "[]"}, "is not a calibration"),
        ({"raw": "{"}, "is not a calibration"),
        ({"raw": "{}"}, "is not a calibration"),
        ({"drop": "rows.ids"}, "is not a calibration"),
        ({"drop": "variance"}, "is not a calibration"),
        ({"add": {"rows.lengths": torch.tensor([5])}}, "is not a calibration"),
        ({"add": {"rows.lengths": torch.tensor([-5, 5])}}, "is not a calibration"),
        ({"add": {"state.x.block": torch.ones(2)}}, "is not a calibration"),
        ({"header": {"latency_conditions": 7}}, "is not a calibration"),
        ({"add": {"latency.0.mlp": torch.ones(1, 2)}}, "is not a calibration"),
    ],
)
def test_f38_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "calibration.safetensors"
    calibrated().save(path)
    damage(path, **change)
    with pytest.raises(ArtifactError, match=message):
        Calibration.load(path)


def test_f37_a_pickle_or_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(ArtifactError, match="there is no such file"):
        Calibration.load(path)
    torch.save({"rows.ids": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="is not a calibration of lit_prune"):
        Calibration.load(path)
