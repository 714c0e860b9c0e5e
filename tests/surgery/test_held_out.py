"""Compensation of the shipped model on text that neither fitted it nor chose its damping."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.calibration import collect_rows
from lit_prune.config import PruningConfig
from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.measuring import calibrate
from lit_prune.planning import compensated, make_plan
from lit_prune.surgery import masked, mean_compensation, unit_columns
from tests.naive import captured

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import corpus

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "python-4.8m"


@pytest.fixture(scope="module")
def case():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = corpus.pack(corpus.stdlib_documents("train"), tokenizer, 256).with_format("torch")
    loader = DataLoader(text.shuffle(seed=0).select(range(120)), batch_size=8)
    rows, _ = collect_rows(model, loader, 2**40)
    config = PruningConfig(pruning_ratio=0.4)
    calibration = calibrate(model, rows, config, progress=False)
    return model, rows, calibration, config


@pytest.mark.slow
def test_least_squares_reconstructs_better_than_the_mean_nearly_everywhere(case):
    model, rows, calibration, config = case
    planned = make_plan(model, calibration, config)  # its draft compensation: least squares
    least, plan = planned.compensation, planned.plan
    mean = mean_compensation(model, plan, calibration.units)
    seen, parts = captured(model, rows, "score")["writes"], DecoderParts(model)
    errors = []
    for index, part in spec_for(model).sub_blocks:
        place = (index, part.kind)
        layer = plan.layers[index]
        kept = layer.kv_groups if part.kind == "attention" else layer.channels
        if not kept or len(kept) == part.num_units:
            continue
        columns = unit_columns(kept, part.unit_width)
        x, weight = seen[place], parts.output(*place).weight.detach().double()
        wanted = x @ weight.T
        found = [
            x[:, columns] @ new.double().T + constant
            for new, constant in (
                (least.weights.get(place, weight[:, columns]), least.constants[place]),
                (weight[:, columns], mean.constants[place]),
            )
        ]
        errors.append([float((y - wanted).square().sum(1).mean()) for y in found])
    below = sum(a < b for a, b in errors)
    assert len(errors) >= 8
    assert below >= 0.95 * len(errors)
    assert sum(a for a, _ in errors) < sum(b for _, b in errors)


@pytest.mark.slow
def test_the_fit_behind_the_pruned_prefix_brings_the_final_stream_nearer(case):
    model, rows, calibration, config = case
    planned = make_plan(model, calibration, config)
    fitted = compensated(model, planned, calibration, config)
    last = len(model.model.layers) - 1
    dense = captured(model, rows, "score")["leaves"][last]
    errors = []
    for compensation in (planned.compensation, fitted.compensation):
        with masked(model, planned.plan, compensation):
            stream = captured(model, rows, "score")["leaves"][last]
        errors.append(float((stream - dense).square().sum(1).mean()))
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_the_default_is_nearer_to_the_dense_stream_than_the_mean_behind_nearly_every_layer(case):
    model, rows, calibration, config = case
    planned = make_plan(model, calibration, config)
    fitted = compensated(model, planned, calibration, config).compensation
    mean = mean_compensation(model, planned.plan, calibration.units)
    dense = captured(model, rows, "score")["leaves"]
    errors = []
    for compensation in (fitted, mean):
        with masked(model, planned.plan, compensation):
            streams = captured(model, rows, "score")["leaves"]
        errors.append([float((streams[i] - dense[i]).square().sum(1).mean()) for i in dense])
    below = sum(a < b for a, b in zip(*errors, strict=True))
    assert len(errors[0]) == len(model.model.layers)
    assert below >= 0.95 * len(errors[0])
    assert sum(errors[0]) < sum(errors[1])
