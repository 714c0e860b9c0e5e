"""Pruning without fine-tuning, both ways."""

import pytest


@pytest.mark.slow
def test_prune_validate_makes_the_same_plan_both_ways(run_recipe, tiny_checkpoint, tmp_path):
    arguments = ("--checkpoint", tiny_checkpoint, "--rows", 12)
    assert "the same plan both ways: True" in run_recipe(
        "prune_validate.py", *arguments, cwd=tmp_path
    )
