"""The small recipes run: the table of the README, and pruning without fine-tuning."""

import pytest


def test_prune_validate_makes_the_same_plan_both_ways(run_recipe, tiny_checkpoint, tmp_path):
    arguments = ("--checkpoint", tiny_checkpoint, "--rows", 12)
    assert "the same plan both ways: True" in run_recipe(
        "prune_validate.py", *arguments, cwd=tmp_path
    )


@pytest.mark.slow
def test_results_prints_a_markdown_table(run_recipe, tiny_checkpoint, tmp_path):
    arguments = ("--checkpoint", tiny_checkpoint, "--rows", 12, "--score-every", 100)
    lines = run_recipe("results.py", *arguments, "--ratios", 0.3, cwd=tmp_path).splitlines()
    assert [line.count("|") for line in lines[:4]] == [7, 7, 7, 7]
    assert "commit" in lines[-1]
