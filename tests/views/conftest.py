import numpy as np
import pytest
import torch

from lit_prune.config import PruningConfig
from lit_prune.decoder import spec_for
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.report import PruningReport, ReportRow
from tests.models import tiny_model


class Views:
    """A tiny model's spec, a plan that also removes sub-blocks and a block, and scores for both."""

    def __init__(self):
        self.spec = spec_for(tiny_model(layers=5))
        self.plan = self.planned({2: ((), ()), 3: ((0, 1), ()), 4: ((), tuple(range(40)))})
        generator = torch.Generator().manual_seed(0)
        self.entropies = {
            (layer, part.kind): torch.randn(
                part.num_units, generator=generator, dtype=torch.float64
            )
            for layer, part in self.spec.sub_blocks
        }
        self.transfer = {
            (layer, kind): float(torch.rand(1, generator=generator)) * 10.0 ** (layer - 2)
            for layer in range(5)
            for kind in ("block", "attention", "mlp")
        }
        self.damage = {
            (layer, part.kind): torch.cat(
                [
                    torch.zeros(1, dtype=torch.float64),
                    torch.rand(part.num_units, generator=generator, dtype=torch.float64).cumsum(0),
                ]
            )
            for layer, part in self.spec.sub_blocks
        }
        self.report = PruningReport(
            requested_ratio=0.3,
            achieved_ratio=0.302,
            total_ratio=0.2,
            preset="paper",
            plan_digest=self.plan.digest,
            dry_run=False,
            config=PruningConfig(pruning_ratio=0.3).to_dict(),
            rows=(
                row("total_parameters", "count", 1000.0, 800.0),
                row("prefill_seconds", "seconds", 0.02, 0.021, "inside the spread"),
                row("decode_tokens_per_second", "tokens_per_second", 100.0, 150.0),
                row("peak_forward_bytes", "bytes", None, None),
                row("perplexity", "perplexity", 10.0, 31.0),
                row("mean_nll", "nats", 2.302, 3.434),
            ),
        )

    def inputs(self, **instead):
        """Keywords of `log_report`."""
        whole = {
            "spec": self.spec,
            "plan": self.plan,
            "report": self.report,
            "entropies": self.entropies,
            "transfer": self.transfer,
            "damage": self.damage,
        }
        return {**whole, **instead}

    def planned(self, layers):
        """A plan of (kv_groups, channels) for some layers; the others lose channels 1, 4, 7 ..."""
        usual = ((0, 1), tuple(i for i in range(48) if i % 3 != 1))
        kept = [LayerPlan(i, *layers.get(i, usual)) for i in range(len(self.spec.blocks))]
        return PruningPlan(self.spec.fingerprint, tuple(kept))


def row(key, unit, before, after, note=""):
    label = key.replace("_", " ")
    return ReportRow(key=key, label=label, unit=unit, before=before, after=after, note=note)


@pytest.fixture
def views():
    return Views()


@pytest.fixture(scope="module")
def unchanged_views():
    """For what is drawn once and read by several tests."""
    return Views()


def is_drawn(image):
    """Whether an ``[height, width, 3]`` image has contrast and more than a few colours."""
    colours = np.unique(image.astype(np.int32) @ [65536, 256, 1])
    return image.std() > 5 and len(colours) > 20
