"""One request, checked at construction: how much to prune, by which method and options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

from lit_prune.amounts import TARGETS, the_target
from lit_prune.checks import (
    check_choice,
    check_integer,
    check_integers,
    check_number,
    refuse_unknown,
)
from lit_prune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

Allocator = Literal["depth_first", "greedy", "uniform", "global", "joint", "uniform_widths"]
Compensator = Literal["mean", "least_squares", "sequential", "none"]
# Those that need covariances.
SQUARES = ("least_squares", "sequential")
Granularity = Literal["block", "sub_block", "kv_group", "channel", "expert"]
UnitScore = Literal["conditional", "entropy", "fluctuation", "random", "activation", "gradient"]
Sensitivity = Literal["kl", "nll", "frobenius", "transfer_entropy", "none"]
Resource = Literal["parameters", "flops", "kv_cache_bytes", "weight_bytes", "latency"]
# What a ratio is a fraction of, in words.
RESOURCES: dict[Resource, str] = {
    "parameters": "decoder parameters",
    "flops": "decoder FLOPs per token",
    "kv_cache_bytes": "KV-cache bytes per token",
    "weight_bytes": "decoder weight bytes",
    "latency": "decoder latency predicted from the measured table",
}
# Requested and achieved pruning ratio differ by at most this, or it is an error.
RATIO_TOLERANCE = 0.005
# Keys that FLOPs are counted for where no latency is measured.
_DEFAULT_CONTEXT = 128
# What an integer is at least, where not 1; numbers that may be 0.
_LEAST = {"num_clusters": 2, "seed": 0, "latency_prompt_tokens": 0, "verify_rounds": 0}
_MAY_BE_ZERO = ("ratio_strength", "search_tolerance")
# What a target counts, where not what ``budget`` says.
_COUNTED: dict[str, Resource] = {
    "target_parameters": "parameters",
    "target_bytes": "parameters",
    "target_speedup": "latency",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningConfig:
    """What to prune and how. Every field is JSON-able; an unknown one is refused.

    The fields marked "Method" are read by some presets only (most are what the ICML 2025 paper's
    published text leaves open; defaults are our reconstruction). One that the preset does not read
    is refused. Each value is recorded in the plan.

    How much is said by exactly one of the first five.

    Attributes:
        pruning_ratio: Fraction of the decoder layers' ``budget`` to remove, in [0, 1): by default
            of *decoder-layer parameters*. Embeddings and head do not count.
        target_parameters: At most so many parameters in *all*, embeddings and head included: a
            number, or ``"6B"``, ``"350M"``.
        target_bytes: At most so many bytes of weights in all, in the dtype that the model is in:
            a number, or ``"8GB"`` (``"8GiB"`` for powers of 1024).
        target_speedup: How many times faster the decoder layers shall be, as ``budget="latency"``
            predicts it from a table measured on the device of the model: 1.5, or ``"1.5x"``.
        max_perplexity_increase: The largest cut whose perplexity on the *choose* side of the text
            stays within this fraction above the dense model's: 0.05, or ``"5%"``. Found by
            bisection: each try plans, compensates and reads that side once.
        budget: Method. What the ratio is a fraction of, and is met in within 0.5 percentage points:
            ``parameters``; ``flops`` for one token that attends to ``latency_prompt_tokens`` keys
            (128 where that is 0), as the report counts them; ``kv_cache_bytes`` for one token;
            ``weight_bytes``; or ``latency``, the sum of what the forwards of all sub-blocks (each
            with its norm) take for a prompt of ``latency_prompt_tokens`` and ``latency_new_tokens``
            decoding steps, ``latency_batch_size`` at once. Latency is measured once, when
            calibrating, at about 16 widths of each shape of sub-block on the device of the model;
            it is a prediction, and the report puts the measured time of the whole model beside it.
            Every preset takes ``parameters``, ``conditional`` all.
        ratio_tolerance: By how much the achieved ratio may miss, at most 0.005.
        preset: Which method. ``conditional`` is ours; ``paper`` our reconstruction of Yang et al.,
            ICML 2025; the rivals that both are compared with are the other keys of
            `lit_prune.methods.PRESETS`.
        allocator: How the budget is distributed; None: as the preset's paper does. ``depth_first``
            (the search of ``paper``), ``greedy`` in its place; ``uniform``: the same number of
            units from every layer, no block removed; ``global``: the lowest-scored units of all
            layers; ``joint``: the search of ``conditional`` over all damage curves;
            ``uniform_widths``: the same with equal widths in all layers that stay.
        granularities: What may be removed: whole ``block``, whole attention or MLP (``sub_block``),
            ``kv_group``, ``channel``, ``expert`` (of a mixture of experts, down to those that each
            token needs). What may go whole is also what transfer entropy is measured of.
        protected_layers: Decoder layers that stay as they are, by index.
        channel_multiple: Kept MLP channels are a multiple of this (or all). None: 64, less on small
            models where 64 channels are too coarse a step for the ratio; the plan records the
            value.
        min_kv_groups: Least KV groups that an attention keeps (unless it is removed whole).
        tensor_parallel: Number of devices that one layer will be spread over. Kept query heads and
            kept MLP channels are multiples of it, kept KV groups too (or a divisor of it, as
            servers copy KV heads).
        compensation: ``mean`` puts the mean output of what was cut into a bias; ``least_squares``
            also folds its conditional mean into the columns that stay; ``sequential`` fits what
            reads the residual stream, what lies inside a sub-block and what it writes, layer by
            layer behind what was cut before, to the dense model's stream (some thirty forwards);
            ``none`` does nothing. None: what the preset's paper does.
        add_biases: False adds no bias, for a place of deployment that has none (Mistral's and
            Qwen's own classes, Qwen3 in llama.cpp): ``sequential`` then fits weights alone, nothing
            stands in for a sub-block that goes whole. None: as the family can be saved.
        language_model: Path of the causal language model inside the module; None finds the only
            one.

        estimator: Method. Entropy of the final hidden state: ``logstd_sum``, ``std_sum`` or
            ``logdet``.
        entropy_floor: Method. Added to a standard deviation before its logarithm.
        transfer_target: Method. Where the final hidden state is read: ``after_norm`` or
            ``before_norm``.
        ratio_map: Method. From transfer entropy to a ratio for each block: ``softmax``,
            ``inverse``, ``rank`` or ``zscore``.
        ratio_temperature: Method. Temperature of ``softmax``.
        ratio_strength: Method. Slope of ``rank`` and ``zscore``.
        num_clusters: Method. K of K-means. None: 3 up to a ratio of 0.35, 6 from 0.45, between them
            whichever of the two is better on the choose text.
        clustering: Method. Which units of a layer are low: the lowest cluster of ``kmeans``
            (scikit-learn, fixed seed) or of ``exact`` (one-dimensional dynamic programme), or all
            below the layer's mean (``mean_threshold``, which has no ``num_clusters``).
        kv_group_score: Method. ``sum`` or ``mean`` of the entropies of a KV group's channels.
        cap_clusters: Method. A block loses never more units than its ratio allows; the search takes
            the shortfall.
        stage_order: Method. ``fine_first``: clusters, then the search for what is left over;
            ``coarse_first``: blocks whose ratio is nearly 1 go first, then clusters, then the
            search.
        exact_hit: Method. How the last deviation from the ratio is closed: ``units``
            (lowest-entropy channels of all layers), ``cluster`` (the next cluster of a layer, then
            units).
        removed_mean: Method. ``add`` the mean output of a whole removed sub-block as a constant, or
            ``drop`` it.
        search_tolerance: Method. Fraction of the budget's whole by which the search may miss the
            ratio, where anything comes that near (``paper`` leaves it to single channels).
        node_limit: Nodes that the depth-first search may visit.
        unit_score: Method. In which order units leave; None: the preset's own. Under
            ``conditional`` by ``conditional`` entropy, or as controls by marginal ``entropy``,
            ``fluctuation`` (FLAP's) or at ``random``. Under ``paper`` by ``entropy``, or as
            controls by magnitude of ``activation`` or ``gradient``.
        sensitivity: Method. What the loss of a whole sub-block (or block) is worth; None: the
            preset's own. ``conditional`` weighs its damage curves by the ``kl`` to the dense model,
            increase of ``nll``, ``frobenius`` norm of the change of the final hidden state,
            ``transfer_entropy``, or ``none``. ``paper`` goes by ``transfer_entropy`` or
            ``frobenius``.
        verify_rounds: Method. Rounds in which ``conditional`` corrects its predictions by the KL of
            drafts on the choose text: a forward for each sub-block, two fits; one fit before.
        damping: Method. Added to a covariance, as a fraction of its mean variance, before it is
            inverted.
        seed: Seed of K-means and of random choices.

        max_calibration_tokens: Stop observing after so many real tokens (the paper: 128 * 2048).
        min_calibration_tokens: Refuse to calibrate on fewer real tokens.
        covariance_bytes: Bytes of covariances (float64) that one pass over the text may hold on the
            device; a model that needs more is passed over several times. All of them end in the
            memory of the CPU.
        replay_batch_tokens: Tokens of one replayed forward: lower it when memory is short.
        search_tokens: Tokens on which sensitivities are measured, and drafts of methods that search
            by real losses, at most; what each layer returns for them is kept in memory meanwhile.
        latency_prompt_tokens: Prompt of the latency measurement; 0 skips it.
        latency_new_tokens: Tokens decoded in it.
        latency_batch_size: Prompts decoded at once; what ``budget`` ``latency`` is of.
        latency_further_batch_sizes: Batch sizes that are measured besides, so that the report shows
            where a gain begins.

    Raises:
        ConfigError: If a value cannot be meant.

    Example:
        >>> PruningConfig(pruning_ratio=0.3).channel_multiple is None
        True
    """

    pruning_ratio: float | None = None
    target_parameters: float | str | None = None
    target_bytes: float | str | None = None
    target_speedup: float | str | None = None
    max_perplexity_increase: float | str | None = None
    budget: Resource = "parameters"
    ratio_tolerance: float = RATIO_TOLERANCE
    preset: str = "conditional"
    allocator: Allocator | None = None
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    protected_layers: tuple[int, ...] = ()
    channel_multiple: int | None = None
    min_kv_groups: int = 1
    tensor_parallel: int = 1
    compensation: Compensator | None = None
    add_biases: bool | None = None
    language_model: str | None = None

    estimator: Literal["logstd_sum", "std_sum", "logdet"] = "logstd_sum"
    entropy_floor: float = 1e-6
    transfer_target: Literal["after_norm", "before_norm"] = "after_norm"
    ratio_map: Literal["softmax", "inverse", "rank", "zscore"] = "softmax"
    ratio_temperature: float = 1.0
    ratio_strength: float = 0.5
    num_clusters: int | None = None
    clustering: Literal["kmeans", "exact", "mean_threshold"] = "kmeans"
    kv_group_score: Literal["sum", "mean"] = "sum"
    cap_clusters: bool = True
    stage_order: Literal["fine_first", "coarse_first"] = "fine_first"
    exact_hit: Literal["units", "cluster"] = "units"
    removed_mean: Literal["add", "drop"] = "add"
    search_tolerance: float = 0.0015
    node_limit: int = 1_000_000
    unit_score: UnitScore | None = None
    sensitivity: Sensitivity | None = None
    verify_rounds: int = 0
    damping: float = 0.01
    seed: int = 0

    max_calibration_tokens: int = 262_144
    min_calibration_tokens: int = 128
    covariance_bytes: int = 8 * 2**30
    replay_batch_tokens: int = 8192
    search_tokens: int = 16_384
    latency_prompt_tokens: int = 128
    latency_new_tokens: int = 16
    latency_batch_size: int = 1
    latency_further_batch_sizes: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        self._check_target()
        for name in ("granularities", "protected_layers", "latency_further_batch_sizes"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
                raise ConfigError(f"{name} must be a list, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for field, hint in get_type_hints(type(self)).items():
            check_choice(field, getattr(self, field), hint)
        if unknown := [g for g in self.granularities if g not in get_args(Granularity)]:
            raise ConfigError(
                "granularities has "
                f"{unknown[0]!r}{did_you_mean(str(unknown[0]), get_args(Granularity))}; known are "
                f"{list(get_args(Granularity))}."
            )
        if not self.granularities:
            raise ConfigError("granularities is empty: nothing could be removed.")
        for name, kind in ((field.name, field.type) for field in fields(self)):
            value = getattr(self, name)
            if kind == "int" or (kind == "int | None" and value is not None):
                check_integer(name, value, _LEAST.get(name, 1))
            elif kind == "float":
                check_number(name, value, above_zero=name not in _MAY_BE_ZERO)
        if self.seed >= 2**32:  # scikit-learn takes 32 bits
            raise ConfigError(f"seed must be below 2**32, got {self.seed}.")
        check_integers("protected_layers", "layer indices", self.protected_layers)
        sizes = self.latency_further_batch_sizes
        check_integers("latency_further_batch_sizes", "numbers of sequences", sizes, 1)
        if self.ratio_tolerance > RATIO_TOLERANCE:
            raise ConfigError(
                f"ratio_tolerance must be at most {RATIO_TOLERANCE}, got {self.ratio_tolerance!r}."
            )
        if self.max_calibration_tokens < self.min_calibration_tokens:
            raise ConfigError(
                f"max_calibration_tokens {self.max_calibration_tokens} is below "
                f"min_calibration_tokens {self.min_calibration_tokens}: no text would be enough."
            )
        if self.clustering == "mean_threshold" and self.num_clusters is not None:
            raise ConfigError(
                f"num_clusters {self.num_clusters} has no meaning under clustering "
                "'mean_threshold': leave one of the two out."
            )
        if self.budget == "latency" and not self.latency_prompt_tokens:
            raise ConfigError(
                "budget 'latency' needs a prompt to measure, got latency_prompt_tokens 0."
            )
        for name, known in (("cap_clusters", bool), ("add_biases", bool | None)):
            if not isinstance(value := getattr(self, name), known):
                raise ConfigError(f"{name} must be true or false, got {value!r}.")
        if (self.channel_multiple or self.tensor_parallel) % self.tensor_parallel:
            raise ConfigError(
                f"channel_multiple {self.channel_multiple} is no multiple of tensor_parallel "
                f"{self.tensor_parallel}: the kept channels could not be spread evenly."
            )
        for name in ("preset", "language_model"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "preset" or value is not None):
                raise ConfigError(f"{name} must be text, got {value!r}.")

    def _check_target(self) -> None:
        target = the_target({name: getattr(self, name) for name in TARGETS})
        if target == "target_speedup" and self.budget == "parameters":  # it is a budget in latency
            object.__setattr__(self, "budget", "latency")
        if self.budget != _COUNTED.get(target, self.budget):
            raise ConfigError(
                f"{target} says what is counted, got budget {self.budget!r} too: leave it out."
            )

    @property
    def target(self) -> str:
        """Which of the five says how much to prune."""
        return the_target({name: getattr(self, name) for name in TARGETS})

    @property
    def ratio(self) -> float:
        """The ``pruning_ratio``.

        Raises:
            ConfigError: If another target was given, that has not been resolved yet.
        """
        if self.pruning_ratio is None:
            raise ConfigError(f"{self.target} is a ratio only once the model is measured.")
        return self.pruning_ratio

    @property
    def adds_constants(self) -> bool:
        """Whether what is cut leaves a bias behind."""
        return self.add_biases is not False and self.compensation != "none"

    def prompt_tokens(self, longest: int | None) -> int:
        """Return the prompt that latency and FLOPs are stated for, at most what a model can read.

        Args:
            longest: Positions that the model knows; None where it has no limit.

        Example:
            >>> PruningConfig(pruning_ratio=0.3, latency_prompt_tokens=512).prompt_tokens(256)
            240
        """
        wanted = self.latency_prompt_tokens or _DEFAULT_CONTEXT
        most = wanted if longest is None else longest - self.latency_new_tokens
        return max(1, min(wanted, most))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able primitives."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make a config from keywords, refusing unknown ones by name.

        Raises:
            ConfigError: Names the unknown key and the nearest known one.

        Example:
            >>> PruningConfig.from_options({"pruning_ratio": 0.3, "presett": "paper"})
            Traceback (most recent call last):
            lit_prune.errors.ConfigError: unknown option 'presett'; did you mean 'preset'?
        """
        refuse_unknown(options, cls)
        return cls(**options)
