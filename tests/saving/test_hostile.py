"""F37 and F38: directories that a stranger may have written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prune.errors import ArtifactError
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.saving.files import sha256_of
from lit_prune.saving.manifest import MAX_MANIFEST_BYTES
from tests.saving.cases import alter, forge, pruned

# ---- F37: code ----


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pkl"])
def test_f37_pickle_in_place_of_weights_is_refused_by_name(name, saved):
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(ArtifactError, match=rf"(?s)model.safetensors is missing.*{name}.*pickle"):
        load_pruned(saved)
    (saved / "MANIFEST.json").unlink()
    with pytest.raises(ArtifactError, match=rf"(?s)no MANIFEST.json.*{name}.*pickle"):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_pruned.py"])
def test_f37_manifest_that_lists_code_is_refused(name, saved):
    (saved / name).write_text("raise SystemExit")
    entry = {"size": 16, "sha256": sha256_of(saved / name)}
    alter(saved / "MANIFEST.json", lambda m: m["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match=f"{name}, which is code or a pickle"):
        load_pruned(saved)


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"attn_implementation": "somebody/kernel"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"_attn_implementation_internal": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"num_labels": 10**9},
        {"to_dict": "x"},
        {"per_layer_config": {"0": {"auto_map": {}}}},
    ],
)
def test_f37_config_that_wants_code_or_changes_methods_is_refused(extra, saved):
    alter(saved / "config.json", lambda c: c.update(extra))
    forge(saved)
    with pytest.raises(ArtifactError, match=next(iter(extra))):
        load_pruned(saved)


def test_f37_unknown_but_harmless_config_keys_are_kept(tmp_path):
    model = pruned()
    model.config.my_note = {"made": "here"}
    loaded = load_pruned(save_pruned(model, tmp_path / "saved", verify=False))
    assert loaded.config.my_note == {"made": "here"}


def test_f37_generation_config_that_replaces_methods_is_refused(saved):
    alter(saved / "generation_config.json", lambda c: c.update(validate="x"))
    forge(saved)
    with pytest.raises(ArtifactError, match="validate"):
        load_pruned(saved)


def test_f37_no_file_of_the_directory_is_run(saved, monkeypatch):
    assert (saved / "modeling_pruned_llama.py").exists()
    (saved / "modeling_pruned_llama.py").write_text("raise SystemExit('run')")
    forge(saved)
    (saved / "lit_prune.py").write_text("raise SystemExit('run')")
    (saved / "configuration.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(saved)
    assert load_pruned(".").config.num_hidden_layers == 4


# ---- F38: hostile or damaged files ----


@pytest.mark.parametrize(
    "name", ["../saved/config.json", "/etc/hostname", "a/b.json", "..", ".", "", "a\x00b", "ä.json"]
)
def test_f38_file_names_stay_plain_and_inside(name, saved):
    entry = {"size": 1, "sha256": "0" * 64}
    alter(saved / "MANIFEST.json", lambda m: m["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="not a plain file name"):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "MANIFEST.json"])
def test_f38_links_out_of_the_directory_are_refused(name, saved, tmp_path):
    outside = (saved / name).rename(tmp_path / "outside")
    (saved / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of its directory"):
        load_pruned(saved)


def test_f38_circle_of_links_is_refused(saved):
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to(saved / "config.json")
    with pytest.raises(ArtifactError, match=r"config.json"):
        load_pruned(saved)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not the JSON"),
        ("[]", "must hold a JSON object"),
        ('{"files": {}, "files": {}}', "a key occurs twice"),
        ('{"schema_version": NaN}', "not a JSON number"),
        ("[" * 100_000, "not the JSON"),
        ('{"schema_version": 99}', "schema_version 99"),
        ('{"schema_version": 1}', "files must be"),
        ('{"schema_version": 1, "files": []}', "files must be"),
        ("\xff", "not UTF-8"),
        ('{"x": "' + "a" * MAX_MANIFEST_BYTES + '"}', "larger than"),
    ],
)
def test_f38_hostile_manifest_is_refused(text, words, saved):
    (saved / "MANIFEST.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=words):
        load_pruned(saved)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"size": -1, "sha256": "0" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": 1, "sha256": "x"},
        7,
    ],
)
def test_f38_manifest_entries_are_strict(entry, saved):
    alter(saved / "MANIFEST.json", lambda m: m["files"].update({"config.json": entry}))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_pruned(saved)


def test_f38_unknown_manifest_key_is_refused(saved):
    alter(saved / "MANIFEST.json", lambda m: m.update(surprise=1))
    with pytest.raises(ArtifactError, match="surprise"):
        load_pruned(saved)


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
@pytest.mark.parametrize("layers", [10**9, -1, 0, "many", None, 3.5])
def test_f38_number_of_layers_is_bounded_by_the_weights(kind, layers, tmp_path):
    path = save_pruned(pruned(kind=kind), tmp_path / "saved", verify=False)
    alter(path / "config.json", lambda c: c.update(num_hidden_layers=layers))
    forge(path)
    with pytest.raises(ArtifactError, match="the weights hold 4"):
        load_pruned(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**12),
        ("hidden_size", 10**12),
        ("intermediate_size", 10**30),
        ("head_dim", 10**12),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -4),
        ("dtype", "load"),
        ("hidden_act", "os.system"),
        ("rope_parameters", {"rope_type": "evil"}),
        (
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 1e9},
        ),
        ("model_type", "mpt"),
        ("model_type", "pruned_llama"),
        ("model_type", "pruned_mpt"),
        ("model_type", "pruned_gpt2"),
        ("model_type", ["llama"]),
        ("id2label", 5),
    ],
)
def test_f38_config_that_contradicts_the_weights_is_refused(key, value, tmp_path):
    path = save_pruned(pruned(kind="uniform"), tmp_path / "saved", verify=False)
    alter(path / "config.json", lambda c: c.update({key: value}))
    forge(path)
    with pytest.raises(ArtifactError):
        load_pruned(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("1", "num_key_value_heads"), 10**9),
        (("1", "num_key_value_heads"), 10**40),
        (("1", "num_key_value_heads"), 0),
        (("1", "num_attention_heads"), 3.0),
        (("1", "num_attention_heads"), 4),
        (("2", "num_attention_heads"), 3),
        (("1", "biases"), ["k_proj", "q_proj"]),
        (("1", "biases"), ["__class__"]),
        (("1", "biases"), [["q_proj"]]),
        (("1", "biases"), "o_proj"),
        (("1", "intermediate_size"), True),
        (("1",), None),
        (("1",), {}),
        (("1", "skip"), ["attention"]),
        (("1", "constants"), ["mlp"]),
        (("1", "_attn_implementation"), "somebody/kernel"),
        (("1", "hidden_size"), 64),
        (("0", "constants"), 1),
        (("0", "constants"), []),
        (("0", "skip"), []),
        (("0", "skip"), ["attention", "mlp"]),
        (("0", "skip"), ["everything"]),
        ((), {}),
        ((), []),
        (("4",), {"skip": ["mlp"]}),
        (("01",), {"skip": ["mlp"]}),
    ],
)
def test_f38_hostile_layers_are_refused(where, value, saved):
    def change(config):
        spot, steps = config, ["per_layer_config", *where]
        for key in steps[:-1]:
            spot = spot[key]
        spot[steps[-1]] = value

    alter(saved / "config.json", change)
    forge(saved)
    with pytest.raises(ArtifactError):
        load_pruned(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 4},
        {"intermediate_size": False},
        {"biases": ["o_proj"]},
        {"head_dim": 16},
        {"model_type": "pruned_mistral"},
        {"model_type": "llama"},
        {"auto_map": {"AutoConfig": "evil.Config"}},
    ],
)
def test_f38_what_stands_beside_the_layers_must_fit_them(change, saved):
    alter(saved / "config.json", lambda config: config.update(change))
    forge(saved)
    with pytest.raises(ArtifactError):
        load_pruned(saved)


def test_f38_weights_that_the_config_does_not_ask_for_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(2)}, saved / "model.safetensors")
    forge(saved)
    with pytest.raises(ArtifactError, match=r"extra: config\.json asks for None"):
        load_pruned(saved)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, saved / "model.safetensors")
    forge(saved)
    with pytest.raises(ArtifactError, match="not a float"):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "report.json", "config.json"])
def test_f38_damaged_files_are_refused_even_when_the_manifest_agrees(name, saved):
    path = saved / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    forge(saved)
    with pytest.raises(ArtifactError):
        load_pruned(saved)
