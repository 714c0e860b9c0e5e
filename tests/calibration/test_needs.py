"""What methods ask for, and that a calibration measures it and nothing else."""

import pytest

from lit_prune.calibration import Calibration, Needs
from lit_prune.config import PruningConfig
from lit_prune.measuring import calibrate
from lit_prune.methods import PRESETS, preset
from tests.models import tiny_model
from tests.naive import uneven_rows
from tests.state import unchanged

STATISTICS = (
    "covariances", "held_out", "curves", "sensitivities", "taylor", "similarities", "inputs",
)  # fmt: skip


def test_two_needs_add_up_without_repeats():
    one = Needs(bypasses=("attention", "mlp"), curves=True)
    other = Needs(bypasses=("mlp", "block"), taylor=True, residuals=True)
    assert one | other == Needs(
        bypasses=("attention", "mlp", "block"), curves=True, taylor=True, residuals=True
    )
    assert one | Needs() == Needs() | one == one
    assert Needs(covariances=True) | Needs(sensitivities=True) == Needs(
        covariances=True, sensitivities=True
    )


@pytest.mark.parametrize(
    "some",
    [{"bypasses": ("mlp",)}]
    + [
        {n: True}
        for n in (
            "changes",
            "covariances",
            "curves",
            "sensitivities",
            "taylor",
            "residuals",
            "latency",
        )
    ],
)
def test_any_need_is_a_need(some):
    assert not Needs()
    assert Needs(**some)


@pytest.mark.parametrize(
    ("name", "options", "measured"),
    [
        ("wanda", {}, set()),
        ("random", {}, set()),
        ("sleb", {}, set()),
        ("flap", {"compensation": "least_squares"}, {"covariances", "held_out"}),
        ("wanda_ls", {}, {"covariances", "held_out"}),
        ("wanda_ls", {"compensation": "none"}, set()),
        ("owl", {}, {"similarities", "inputs"}),
        ("shortgpt", {}, {"similarities", "inputs"}),
        ("llm_pruner", {}, {"taylor"}),
        ("conditional", {}, {"covariances", "held_out", "curves", "sensitivities"}),
        ("conditional", {"sensitivity": "none"}, {"covariances", "held_out", "curves"}),
    ],
)
def test_what_is_asked_for_is_measured_and_no_more(name, options, measured):
    model = tiny_model(layers=2)
    config = PruningConfig(pruning_ratio=0.3, preset=name, **options)
    with unchanged(model):
        found = calibrate(model, uneven_rows(16), config, progress=False)
    here = {name for name in STATISTICS if getattr(found, name) is not None}
    assert here == measured
    assert found.bypassed is None
    method = preset(name)
    assert found.lacks(method.all_needs(method.resolve(config))) == ()


@pytest.mark.parametrize("name", PRESETS)
def test_a_bare_calibration_lacks_exactly_what_is_asked_for(name):
    method = preset(name)
    config = method.resolve(PruningConfig(pruning_ratio=0.3, preset=name))
    needs = method.all_needs(config)
    bare = Calibration("fingerprint", uneven_rows(4), {})
    names = ("covariances", "curves", "changes", "sensitivities", "taylor")
    wanted = [n for n in names if getattr(needs, n)]
    assert bare.lacks(needs) == (*wanted, *(("similarities",) if needs.residuals else ()))
    nothing = method.resolve(PruningConfig(pruning_ratio=0.0, preset=name))
    assert not method.all_needs(nothing)


def test_transfer_entropy_is_measured_of_what_conditional_weighs_by_it():
    model = tiny_model(layers=2)
    config = PruningConfig(pruning_ratio=0.3, preset="conditional", sensitivity="transfer_entropy")
    found = calibrate(model, uneven_rows(16), config, progress=False)
    assert {unit.kind for unit in found.bypassed} == {"attention", "mlp"}
    assert len(found.bypassed) == 4
    assert found.sensitivities is None


def test_everything_survives_a_file(tmp_path):
    import torch

    model, rows = tiny_model(layers=2), uneven_rows(16)
    names = ("conditional", "owl", "llm_pruner")
    for name in names:
        config = PruningConfig(pruning_ratio=0.3, preset=name)
        found = calibrate(model, rows, config, progress=False)
        path = tmp_path / f"{name}.safetensors"
        found.save(path)
        again = Calibration.load(path)
        for statistic in STATISTICS:
            before, after = getattr(found, statistic), getattr(again, statistic)
            assert (before is None) == (after is None)
            if isinstance(before, dict):
                assert before.keys() == after.keys()
                assert all(torch.equal(before[place], after[place]) for place in before)
            elif before is not None:
                assert torch.equal(before, after)
        assert again.data_digest == found.data_digest
