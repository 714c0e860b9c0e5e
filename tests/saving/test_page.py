"""``report.html`` of a saved model, and made again from its directory."""

import json

import pytest

from lit_prune.errors import ArtifactError, PlanMismatchError
from lit_prune.saving import save_pruned
from lit_prune.saving.page import html_of_directory
from lit_prune.sweep import SweepPoint
from tests.saving.cases import pruned


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pruned(pruned(), tmp_path_factory.mktemp("page") / "it's <mine>", verify=False)


def test_a_saved_model_has_its_page(saved):
    page = (saved / "report.html").read_text(encoding="utf-8")
    assert "it's &lt;mine&gt;, pruned by lit_prune" in page
    assert 'load_pruned("it\'s &lt;mine&gt;")' in page
    assert "49.9 % of the decoder parameters" in page
    assert "report.html" in json.loads((saved / "MANIFEST.json").read_text())["files"]


def test_the_directory_alone_makes_the_same_page(saved, tmp_path):
    assert html_of_directory(saved) == (saved / "report.html").read_text(encoding="utf-8")
    # plan and report alone do, too: a run's folder
    for name in ("plan.json", "report.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    page = html_of_directory(tmp_path)
    assert "No model lies beside this page" in page
    assert "49.9 % of the decoder parameters" in page


def test_a_sweep_goes_on_the_page(tmp_path):
    points = (SweepPoint(0.1, 0.1, predicted_damage=0.5),)
    path = save_pruned(pruned(), tmp_path / "swept", sweep=points, verify=False)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "The trade-off" in page
    assert page == html_of_directory(path, sweep=points)


def test_a_model_without_a_plan_has_no_page(tmp_path):
    path = save_pruned(pruned(kind="dense"), tmp_path / "dense", verify=False)
    assert not (path / "report.html").exists()
    with pytest.raises(ArtifactError, match=r"has no plan\.json and no report\.json"):
        html_of_directory(path)
    with pytest.raises(ArtifactError, match="is not a directory"):
        html_of_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda raw: raw.update(conditions={"latency": [3]}), "cannot be shown"),
        (lambda raw: raw.update(achieved_ratio="much"), "cannot be shown"),
        (lambda raw: raw.pop("rows"), "not a lit_prune report"),
    ],
)
def test_a_report_of_another_kind_is_named(saved, tmp_path, change, error):
    raw = json.loads((saved / "report.json").read_text())
    change(raw)
    (tmp_path / "report.json").write_text(json.dumps(raw))
    (tmp_path / "plan.json").write_bytes((saved / "plan.json").read_bytes())
    with pytest.raises(ArtifactError, match=error):
        html_of_directory(tmp_path)


def test_a_plan_of_another_report_is_refused(saved, tmp_path):
    other = pruned(kind="uniform").pruning_record.plan
    (tmp_path / "plan.json").write_text(other.to_json())
    (tmp_path / "report.json").write_bytes((saved / "report.json").read_bytes())
    with pytest.raises(PlanMismatchError, match="were not made together"):
        html_of_directory(tmp_path)
