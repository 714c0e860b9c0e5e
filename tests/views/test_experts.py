"""Pictures of mixtures of experts name their units."""

from lit_prune.decoder import spec_for
from lit_prune.plan import PruningPlan
from lit_prune.views import kept_units
from tests.models import tiny_mixture


def test_experts_are_called_experts():
    titles = {}
    for family in ("mixtral", "qwen3_moe"):
        spec = spec_for(tiny_mixture(family))
        figure = kept_units(spec, PruningPlan.keep_all(spec))
        titles[family] = figure.axes[1].get_title(loc="left")
    assert titles["mixtral"].startswith("experts: 24 of 24 kept")
    assert titles["qwen3_moe"].startswith("expert or MLP channels: 66 of 66 kept")
