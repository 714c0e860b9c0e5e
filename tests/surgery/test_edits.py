import pytest
import torch
from torch import nn

from lit_prune.surgery import StagedEdits


class Config:
    width = 4


def staged(linear, config):
    edits = StagedEdits()
    edits.parameter(linear, "weight", linear.weight[:, :3])
    edits.attribute(linear, "in_features", 3)
    edits.parameter(linear, "bias", torch.ones(2), like=linear.weight)
    edits.attribute(config, "width", 3)
    edits.attribute(config, "depth", 1)
    return edits


def test_nothing_happens_before_commit_and_everything_at_it():
    linear, config = nn.Linear(4, 2, bias=False), Config()
    weight = linear.weight
    edits = staged(linear, config)
    assert linear.weight is weight
    assert len(edits) == 5
    edits.commit()
    assert linear.weight.shape == (2, 3)
    assert linear.in_features == config.width == 3
    assert linear.bias.tolist() == [1, 1]
    edits.rollback()
    assert linear.weight is weight
    assert linear.bias is None
    assert linear.in_features == config.width == 4
    assert not hasattr(config, "depth")


@pytest.mark.parametrize("k", range(5))
def test_f26_a_failing_assignment_takes_back_the_ones_before_it(k, monkeypatch):
    linear, config = nn.Linear(4, 2, bias=False), Config()
    weight = linear.weight
    edits = staged(linear, config)
    plain, done = StagedEdits._assign, []

    def failing(edit):
        if len(done) == k:
            raise KeyboardInterrupt
        done.append(edit)
        plain(edit)

    monkeypatch.setattr(StagedEdits, "_assign", staticmethod(failing))
    with pytest.raises(KeyboardInterrupt):
        edits.commit()
    assert linear.weight is weight
    assert linear.bias is None
    assert linear.in_features == config.width == 4
    assert not hasattr(config, "depth")


def test_f29_a_new_parameter_owns_its_memory_and_follows_the_old_one():
    linear = nn.Linear(8, 4).half().requires_grad_(False)
    edits = StagedEdits()
    with torch.inference_mode():
        view = linear.weight[:, ::2]
    with torch.inference_mode(False):
        edits.parameter(linear, "weight", view.double())
    edits.commit()
    new = linear.weight
    assert new.dtype == torch.float16
    assert not new.requires_grad
    assert not new.is_inference()
    assert new.is_contiguous()
    assert new.untyped_storage().nbytes() == new.numel() * 2


def test_removing_a_module_and_bringing_it_back():
    holder = nn.ModuleDict({"a": nn.Linear(2, 2)})
    old, edits = holder["a"], StagedEdits()
    edits.attribute(holder, "a", nn.Identity())
    edits.commit()
    assert isinstance(holder["a"], nn.Identity)
    edits.rollback()
    assert holder["a"] is old
    assert list(holder) == ["a"]


def test_followers_are_called_after_every_change_and_after_its_return():
    linear, edits, seen = nn.Linear(4, 2), StagedEdits(), []
    edits.parameter(linear, "weight", linear.weight[:, :3])
    edits.follow(lambda: seen.append(linear.weight.shape[1]))
    edits.commit()
    edits.rollback()
    assert seen == [3, 4]


def test_a_follower_that_fails_takes_the_commit_back():
    linear, edits = nn.Linear(4, 2), StagedEdits()

    def follower():
        if linear.weight.shape[1] == 3:
            raise RuntimeError("no")

    edits.parameter(linear, "weight", linear.weight[:, :3])
    edits.follow(follower)
    with pytest.raises(RuntimeError, match="no"):
        edits.commit()
    assert linear.weight.shape[1] == 4
