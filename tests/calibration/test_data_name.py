"""The name of the calibration text, from real data sets of `datasets`."""

from datasets import load_dataset
from torch.utils.data import DataLoader, Subset

from lit_prune import prune, save_pruned
from lit_prune.calibration import data_notes
from tests.models import batches_of, tiny_model, tiny_rows


def dataset(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    return load_dataset(
        "text", data_files={"validation": str(tmp_path / "a.txt")}, split="validation",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_a_data_set_is_called_by_its_name_and_split(tmp_path):
    found = dataset(tmp_path)
    notes = data_notes(DataLoader(found))
    assert len(notes) == 1
    assert notes[0].startswith("calibration data: text (")
    assert notes[0].endswith("split validation")
    assert data_notes([DataLoader(Subset(found, [0])), DataLoader(found)]) == notes


def test_what_has_no_name_gets_none():
    assert data_notes(DataLoader([1, 2])) == data_notes(iter([1])) == data_notes(None) == ()


def test_the_name_reaches_the_model_card(tmp_path):
    rows = dataset(tmp_path).map(lambda _: {"input_ids": [5]}, remove_columns="text")

    class Loader:
        dataset = rows

        def __iter__(self):
            return iter(batches_of(tiny_rows(24), 4))

    model = tiny_model()
    prune(
        model, Loader(), pruning_ratio=0.3, preset="flap",
        latency_prompt_tokens=0, progress=False,
    )  # fmt: skip
    path = save_pruned(model, tmp_path / "saved", verify=False)
    card = (path / "README.md").read_text()
    assert "calibration data: text" in card
    assert "longest_sample 24" in card
