import json
import math
from dataclasses import fields

import pytest

from lit_prune.config import PruningConfig
from lit_prune.errors import ConfigError


@pytest.mark.parametrize(
    "ratio", [math.nan, math.inf, -0.1, 1, 1.5, 30, True, False, "0.3", [0.3], 0.3j]
)
def test_f01_a_ratio_that_cannot_be_meant_says_what_it_is_and_the_complement(ratio):
    with pytest.raises(
        ConfigError, match=r"number in \[0, 1\), got .*fraction .*removed: "
    ) as error:
        PruningConfig(pruning_ratio=ratio)
    expected = (
        "for 30 % pass 0.3" if ratio == 30 else "for 1.5 % pass" if ratio == 1.5 else "pass 0.2"
    )
    assert expected in str(error.value)
    assert isinstance(error.value, ValueError)


def test_f02_zero_is_legal():
    assert PruningConfig(pruning_ratio=0).pruning_ratio == 0
    assert PruningConfig(pruning_ratio=0.0).pruning_ratio == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ration": 0.3}, "'pruning_ration'; did you mean 'pruning_ratio'"),
        ({"pruning_ratio": 0.3, "alocator": "x"}, "'alocator'; did you mean 'allocator'"),
        ({"pruning_ratio": 0.3, "zzz": 1}, r"unknown option 'zzz'\. Known: \["),
        ({}, "pruning_ratio is missing"),
    ],
)
def test_f03_unknown_keys_name_the_nearest(options, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig.from_options(options)


BAD = [
    ({"allocator": "dfs"}, "allocator must be one of .*got 'dfs'"),
    ({"estimator": None}, "estimator must be one of"),
    ({"clustering": ["kmeans"]}, "clustering must be one of"),
    ({"granularities": ("blok",)}, "granularities has 'blok'; did you mean 'block'"),
    ({"granularities": ()}, "granularities is empty"),
    ({"granularities": "block"}, "granularities must be a list, got 'block'"),
    ({"granularities": 3}, "granularities must be a list, got 3"),
    ({"granularities": ({},)}, "granularities has"),
    ({"protected_layers": 3}, "protected_layers must be a list, got 3"),
    ({"protected_layers": (1.0,)}, "protected_layers must be layer indices"),
    ({"protected_layers": (True,)}, "protected_layers must be layer indices"),
    ({"latency_further_batch_sizes": (8, 0)}, "latency_further_batch_sizes must be numbers of"),
    ({"latency_further_batch_sizes": 8}, "latency_further_batch_sizes must be a list, got 8"),
    ({"channel_multiple": 0}, "channel_multiple must be an integer of at least 1, got 0"),
    ({"channel_multiple": 8.0}, "channel_multiple must be an integer"),
    ({"min_kv_groups": 0}, "min_kv_groups must be an integer of at least 1"),
    ({"unit_score": "magnitude"}, "unit_score must be one of .*got 'magnitude'"),
    (
        {"clustering": "mean_threshold", "num_clusters": 3},
        "num_clusters 3 has no meaning under clustering 'mean_threshold'",
    ),
    ({"max_calibration_tokens": 99}, "max_calibration_tokens 99 is below min_calibration_tokens 1"),
    ({"num_clusters": 1}, "num_clusters must be an integer of at least 2"),
    ({"node_limit": True}, "node_limit must be an integer"),
    ({"node_limit": None}, "node_limit must be an integer"),
    ({"seed": -1}, "seed must be an integer of at least 0"),
    ({"entropy_floor": 0}, "entropy_floor must be a number above 0"),
    ({"entropy_floor": math.nan}, "entropy_floor must be"),
    ({"entropy_floor": math.inf}, "entropy_floor must be"),
    ({"entropy_floor": "1"}, "entropy_floor must be"),
    ({"ratio_temperature": -1}, "ratio_temperature must be a number above 0"),
    ({"ratio_strength": math.nan}, "ratio_strength must be a number at least 0"),
    ({"search_tolerance": math.inf}, "search_tolerance must be"),
    ({"cap_clusters": "no"}, "cap_clusters must be"),
    ({"cap_clusters": 1}, "cap_clusters must be"),
    ({"preset": 3}, "preset must be text"),
    ({"language_model": 3}, "language_model must be text"),
    ({"seed": 2**32}, "seed must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_f04_what_cannot_be_meant_is_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(pruning_ratio=0.3, **options)


def test_every_field_is_json_and_documented():
    config = PruningConfig(pruning_ratio=0.3, protected_layers=[0, 2], granularities=["block"])
    raw = json.loads(json.dumps(config.to_dict()))
    assert PruningConfig.from_options(raw) == config
    assert config.protected_layers == (0, 2)
    for field in fields(PruningConfig):
        assert f"        {field.name}: " in PruningConfig.__doc__
    hash(config)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        PruningConfig(pruning_ratio=0.3).pruning_ratio = 0.5
