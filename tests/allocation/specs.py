"""Random decoders without a model, and the rules written out naively."""

import itertools
import random

from lit_prune.allocation import Budget, parameter_cost
from lit_prune.allocation import budget as budget_module
from lit_prune.config import PruningConfig
from lit_prune.decoder import AttentionSpec, BlockSpec, DecoderSpec, MlpSpec


def attention(groups=2, *, unit=120, fixed=16, bias=False):
    return AttentionSpec(
        name="a", num_kv_groups=groups, queries_per_group=1, head_dim=4,
        unit_parameters=unit, fixed_parameters=fixed, output_bias=bias,
    )  # fmt: skip


def mlp(channels=8, *, unit=48, fixed=16, bias=False):
    return MlpSpec(
        name="m", num_channels=channels, unit_parameters=unit, fixed_parameters=fixed,
        output_bias=bias,
    )  # fmt: skip


def decoder(*blocks, hidden=16, shared=None):
    """A decoder; ``shared``: parameters of the norm that both halves of a parallel layer read."""
    made = tuple(
        BlockSpec(
            index=i, name=str(i), attention=a, mlp=m, shared_parameters=(a and m and shared) or 0
        )
        for i, (a, m) in enumerate(blocks)
    )
    return DecoderSpec(
        model_type="llama", hidden_size=hidden, blocks=made, total_parameters=10**6,
        fingerprint="x", parallel=shared is not None,
    )  # fmt: skip


def random_decoder(rng, *, most_layers=3, channels=(1, 3, 4, 7, 8, 12), parallel=False):
    blocks = []
    for layer in range(rng.randint(1, most_layers)):
        bias = rng.random() < 0.3
        a = attention(rng.choice([1, 2, 4]), unit=rng.choice([64, 120, 200]), bias=bias)
        m = mlp(rng.choice(channels), unit=rng.choice([48, 96]), bias=bias)
        drawn = rng.random() if layer else 1
        blocks.append((None if drawn < 0.15 else a, None if 0.15 <= drawn < 0.3 else m))
    return decoder(*blocks, shared=rng.choice([0, 24, 32]) if parallel else None)


def plain_budget(spec, config, cost=None):
    """The budget without its refusal."""
    cost = cost or parameter_cost(spec)
    multiple = config.channel_multiple or budget_module._auto_multiple(spec, config, cost)
    return Budget(spec, config, multiple, budget_module._allowed(spec, config, multiple), cost)


def random_request(rng, spec, **fixed):
    kinds = ("block", "sub_block", "kv_group", "channel")
    options = {
        "pruning_ratio": rng.choice([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95]),
        "granularities": tuple(k for k in kinds if rng.random() < 0.6) or ("channel",),
        "protected_layers": tuple(b.index for b in spec.blocks[1:] if rng.random() < 0.2),
        "channel_multiple": rng.choice([None, 1, 2, 4]),
        "min_kv_groups": rng.choice([1, 1, 2]),
        "compensation": rng.choice(["mean", "none"]),
        "removed_mean": rng.choice(["add", "drop"]),
    }
    return PruningConfig(**{**options, **fixed})


def naive_counts(spec, config, multiple):
    """Every combination of kept counts that the request allows, by the words of its docstring."""
    choices, places = [], []
    kinds = set(config.granularities)
    for block in spec.blocks:
        halves = []
        for part in block.sub_blocks:
            kept = {part.num_units}
            if block.index not in config.protected_layers:
                if part.kind == "attention" and "kv_group" in kinds:
                    kept |= set(range(config.min_kv_groups, part.num_units))
                if part.kind == "mlp" and "channel" in kinds:
                    kept |= {c for c in range(1, part.num_units) if c % multiple == 0}
                if kinds & {"block", "sub_block"}:
                    kept.add(0)
            halves.append(kept)
            places.append((block.index, part.kind))
        whole = [
            combination
            for combination in itertools.product(*halves)
            if "sub_block" in kinds or len({bool(c) for c in combination}) <= 1
        ]
        choices.append(whole)
    for combination in itertools.product(*choices):
        counts = dict(zip(places, itertools.chain(*combination), strict=True))
        if any(count for (_, kind), count in counts.items() if kind == "attention"):
            yield counts


def num_combinations(spec, budget):
    total = 1
    for allowed in budget.allowed.values():
        total *= len(allowed)
    return total


def small_case(seed, *, parallel=False):
    """A budget whose combinations can all be tried."""
    rng = random.Random(seed)
    while True:
        spec = random_decoder(rng, parallel=parallel)
        config = random_request(rng, spec)
        budget = plain_budget(spec, config)
        if num_combinations(spec, budget) <= 3000:
            return budget
