"""One test that every decoder family passes."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lit_prune.calibration import Row, RowSet, replay
from lit_prune.config import RATIO_TOLERANCE, Granularity
from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import (
    BudgetError,
    ContractError,
    FormatError,
    PlanMismatchError,
    UnsupportedModelError,
)
from lit_prune.pruner import prune
from lit_prune.saving import load_pruned, save_pruned
from lit_prune.surgery import apply_plan, masked, mean_compensation
from lit_prune.testing.broken import add_parameter, widen
from lit_prune.testing.plans import random_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan

# Difference of logits that counts as none, as a fraction of the largest logit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROWS, _TOKENS, _NEW_TOKENS = 48, 24, 8
_FORMATS = ("stock", "heterogeneous", "padded")
_ALIKE = "stock (alike)"
_UNREACHED = "no ratio tried can be reached with layers that are alike"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyContract:
    """What `check_family` found.

    Attributes:
        family: Hugging Face ``config.model_type``.
        granularities: What can be removed, each tried.
        refused: What cannot, each with the reason.
        constants: Whether a constant can stand in for a whole removed sub-block.
        formats: What each format of `save_pruned` made of the pruned model, and, as ``stock
            (alike)``, of one whose layers stay alike: ``held``, ``held with add_biases=False``, or
            why not.
        checks: What was checked, in the order in which it was.
    """

    family: str
    granularities: tuple[str, ...]
    refused: dict[str, str]
    constants: bool
    formats: dict[str, str]
    checks: tuple[str, ...] = field(repr=False)


def check_family(model: PreTrainedModel, *, ratio: float = 0.3, seed: int = 0) -> FamilyContract:
    """Check that everything lit_prune does with a model is exact, or refused by name.

    On copies of the model: the sizes that it is described by, random plans of every granularity
    that its family allows (logits against the masked dense model, generation with and without a
    cache, gradients), `prune` to ``ratio``, saving and loading in every format that can hold it,
    and that a part which the entry does not know is an error.

    Args:
        model: A tiny random model: at least two layers, weights large enough for a mistake to show
            (a standard deviation of 0.3, say), float32 or float64, on the CPU. It is left as it
            was.
        ratio: What `prune` is asked for.
        seed: Of the plans and of the text.

    Returns:
        What may be removed, and which formats hold the result.

    Raises:
        ContractError: Names the first thing that is not as it must be.
        UnsupportedModelError: If the family is not known, or not described rightly.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...     num_attention_heads=4, num_key_value_heads=2, vocab_size=64, pad_token_id=0,
        ...     max_position_embeddings=64, initializer_range=0.3)
        >>> check_family(LlamaForCausalLM(config)).formats["heterogeneous"]
        'held'
    """
    case = _Case(copy.deepcopy(model).eval(), random.Random(seed))  # noqa: S311 - no secret
    case.sizes()
    case.unknown_parts()
    case.refusals()
    for name, plan in case.plans():
        case.surgery(name, plan)
    case.again()
    formats = case.formats(ratio)
    spec = case.spec
    return FamilyContract(
        family=spec.model_type,
        granularities=case.granularities,
        refused=dict(spec.refused),
        constants=spec.removed_constants,
        formats=formats,
        checks=tuple(case.done),
    )


class _Case:
    """One model under the contract; what is done to it is done to copies."""

    def __init__(self, model: PreTrainedModel, rng: random.Random) -> None:
        self.spec = spec_for(model)
        if self.spec.has_experts:  # rounding decides between equally good ones, but in float64
            model = model.double()
        self.model, self.rng, self.done = _plain_loops(model), rng, list[str]()
        refused = dict(self.spec.refused)
        there = {"block", "sub_block", *(part.unit for _, part in self.spec.sub_blocks)}
        self.granularities = tuple(g for g in get_args(Granularity) if g in there - set(refused))
        numbers = torch.Generator().manual_seed(rng.randrange(2**31))
        self.special = 3  # the first ids are padding and the like
        self.ids = torch.randint(
            self.special, model.config.vocab_size, (_ROWS, _TOKENS), generator=numbers
        )
        if model.dtype not in _TOLERANCE or len(self.spec.blocks) < 2:
            raise ContractError(
                f"check_family needs a float32 or float64 model of two layers or more, got "
                f"{model.dtype} and {len(self.spec.blocks)}."
            )

    # ---- what is checked ----

    def sizes(self) -> None:
        """The spec adds up to what is there."""
        layers = DecoderParts(self.model).layers
        for block, layer in zip(self.spec.blocks, layers, strict=True):
            counted = sum(p.numel() for p in layer.parameters())
            self._need(counted == block.num_parameters, f"{block.name} has {counted} parameters, "
                       f"its spec says {block.num_parameters}")  # fmt: skip
        self.done.append("sizes")

    def unknown_parts(self) -> None:
        """A parameter that the entry does not name, and a shape that contradicts, are errors."""
        for what, change in (
            ("unknown parameter", add_parameter),
            ("contradicting shape", widen),
        ):
            odd = copy.deepcopy(self.model)
            change(DecoderParts(odd))
            try:
                spec_for(odd)
            except UnsupportedModelError:
                self.done.append(f"{what} refused")
                continue
            raise ContractError(f"{what}: spec_for accepted it; expected UnsupportedModelError.")

    def refusals(self) -> None:
        """A plan of a refused granularity is refused, whoever made it."""
        for name, _ in self.spec.refused:
            plan = random_plan(self.spec, self.rng, {name})
            if plan is None:
                continue
            try:
                apply_plan(copy.deepcopy(self.model), plan)
            except PlanMismatchError:
                self.done.append(f"{name} refused")
                continue
            raise ContractError(f"granularity {name!r} is refused, and a plan of it was applied.")

    def plans(self) -> Iterator[tuple[str, PruningPlan]]:
        """Yield random plans: of each granularity alone, and of all together."""
        for name in self.granularities:
            if (plan := random_plan(self.spec, self.rng, {name})) is not None:
                yield name, plan
        for number in range(3):
            if (plan := random_plan(self.spec, self.rng, set(self.granularities))) is not None:
                yield f"all together, {number}", plan

    def surgery(self, name: str, plan: PruningPlan) -> None:
        """Sliced is masked, cached is uncached, everything left is counted and trainable."""
        model = copy.deepcopy(self.model)
        rows = RowSet.of(Row.of(row) for row in self.ids)
        compensation = mean_compensation(model, plan, replay(model, rows).units)
        for made in (None, compensation):
            what = f"{name}{'' if made is None else ' with the mean'}"
            model = copy.deepcopy(self.model)
            with torch.no_grad(), masked(model, plan, made):
                wanted = self._logits(model)
            apply_plan(model, plan, made, verify=False)
            self._same(wanted, self._logits(model), f"{what}: sliced and masked logits")
            counted = sum(p.numel() for p in DecoderParts(model).layers.parameters())
            left = spec_for(model).decoder_parameters
            self._need(counted == left, f"{what}: {counted} parameters are left, the spec of the "
                       f"pruned model says {left}")  # fmt: skip
            self._generates(model, what)
            self._trains(model, what)
        self.done.append(f"surgery: {name}")

    def again(self) -> None:
        """A pruned model is described by its weights, and can be pruned again."""
        model = copy.deepcopy(self.model)
        plan = random_plan(self.spec, self.rng, set(self.granularities) - {"block"})
        if plan is not None:
            twice = _Case(apply_plan(model, plan, verify=False), self.rng)
            twice.sizes()
            if (plan := random_plan(twice.spec, self.rng, set(self.granularities))) is not None:
                twice.surgery("a second time", plan)
            self.done.append("pruned again")

    def pruned(self, ratio: float, **options: Any) -> PreTrainedModel:
        """Return a copy pruned as a user would."""
        model = copy.deepcopy(self.model)
        batches = [{"input_ids": ids} for ids in self.ids.split(6)]
        options = {"latency_prompt_tokens": 0, "progress": False, **options}
        report = prune(model, batches, pruning_ratio=ratio, **options).report
        missed = abs(report.achieved_ratio - ratio)
        self._need(
            missed <= RATIO_TOLERANCE,
            f"prune reached {report.achieved_ratio:.4f}, it was asked for {ratio}",
        )
        for name, reason in self.spec.refused:
            told = any(name in warning and reason in warning for warning in report.warnings)
            self._need(told, f"the report does not say that {name!r} was left out")
        self._generates(model, "prune")
        self.done.append("prune")
        return model

    def saved(self, model: PreTrainedModel, name: str) -> str:
        """Save, load, compare; return ``held`` or what the format lacks."""
        wanted = self._logits(model)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "saved"
            try:
                save_pruned(model, path, format=name, verify=False)
            except FormatError as error:
                return error.reason
            loaded = _plain_loops(load_pruned(path))
            self._same(wanted, self._logits(loaded), f"{name}: saved and loaded logits")
            if name != "heterogeneous":
                plain = self._logits(_plain_loops(_from_pretrained(path)))
                self._same(wanted, plain, f"{name}: logits in plain transformers")
        self.done.append(f"saved: {name}")
        return "held"

    def formats(self, ratio: float) -> dict[str, str]:
        """Return what each format makes of the pruned model, with biases and, if need be, without.

        ``stock (alike)`` is of one whose layers stay alike.
        """
        made: dict[str, PreTrainedModel | None] = {"": self.pruned(ratio)}
        alike = {"allocator": "uniform_widths", "channel_multiple": 1}
        found: dict[str, str] = {}
        for name in (*_FORMATS, _ALIKE):
            for words, options in (("", {}), (" with add_biases=False", {"add_biases": False})):
                key = f"{name if name == _ALIKE else ''}{words}"
                if key not in made:
                    made[key] = self._nearly(ratio, **options, **(alike if name == _ALIKE else {}))
                model = made[key]
                reason = _UNREACHED if model is None else self.saved(model, name.split()[0])
                found.setdefault(name, reason)
                if reason == "held":
                    found[name] = f"held{words}"
                    break
        return found

    def _nearly(self, ratio: float, **options: Any) -> PreTrainedModel | None:
        """Return a copy pruned by about as much: few ratios can be reached with layers alike."""
        for wanted in (ratio, ratio - 0.05, ratio - 0.1, ratio + 0.1):
            try:
                return self.pruned(wanted, **options)
            except BudgetError:
                continue
        return None

    # ---- how ----

    def _logits(self, model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=self.ids[:3], use_cache=False).logits
        return logits

    def _generates(self, model: PreTrainedModel, what: str) -> None:
        ids, mask = self.ids[:3].clone(), torch.ones_like(self.ids[:3])
        for row, padding in enumerate((0, 3, 7)):  # on the left
            ids[row, :padding], mask[row, :padding] = 0, 0
        generate: Any = model.generate
        generate = partial(
            generate, input_ids=ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        self._need(
            torch.equal(generate(use_cache=True), generate(use_cache=False)),
            f"{what}: generation with a cache differs from that without one",
        )

    def _trains(self, model: PreTrainedModel, what: str) -> None:
        model.zero_grad()
        with torch.enable_grad():
            model(input_ids=self.ids[:3], labels=self.ids[:3]).loss.backward()
        for name, parameter in model.named_parameters():
            reached = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
            self._need(reached, f"{what}: no finite gradient reaches {name}")

    def _same(self, wanted: Tensor, got: Tensor, what: str) -> None:
        worst = float((wanted - got).abs().max())
        limit = _TOLERANCE[wanted.dtype] * float(wanted.abs().max())
        self._need(worst <= limit, f"{what} differ by {worst:.3g}, expected at most {limit:.3g}")

    def _need(self, fact: bool, otherwise: str) -> None:
        if not fact:
            raise ContractError(
                f"family {self.spec.model_type!r}: {otherwise}. Correct its entry "
                "(lit_prune.decoder.Family), or refuse the granularity there with the reason."
            )


def _from_pretrained(path: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.eval()  # type: ignore[no-any-return] # untyped upstream


def _plain_loops(model: PreTrainedModel) -> PreTrainedModel:
    """Let experts be computed one after the other: fused kernels know no float64."""
    if spec_for(model).has_experts:
        model.set_experts_implementation("eager")
    return model
