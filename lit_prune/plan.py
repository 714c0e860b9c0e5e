"""The pruning plan: a value that says what stays."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError, PlanMismatchError

if TYPE_CHECKING:
    from lit_prune.decoder import DecoderSpec, SubBlockKind

SCHEMA_VERSION = 1
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one decoder layer keeps, in indices of the model that the plan was made for.

    Attributes:
        index: Position in the stack of that model.
        kv_groups: Kept KV groups, ascending; ``()`` removes the attention sub-block.
        channels: Kept intermediate channels, or experts where the layer has a mixture of them,
            ascending; ``()`` removes the MLP sub-block.
    """

    index: int
    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]

    def kept(self, kind: SubBlockKind) -> tuple[int, ...]:
        """Return the kept units of the attention or the MLP."""
        return self.kv_groups if kind == "attention" else self.channels


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Which units stay. Equal kept units on the same architecture have equal digests.

    Attributes:
        model_fingerprint: `DecoderSpec.fingerprint` of the model that the plan was made for.
        layers: One entry for each decoder layer of that model, in order.
        provenance: How it came about (request, method, calibration, versions); not part of the
            digest.

    Example:
        >>> plan = PruningPlan("abc", (LayerPlan(0, (0, 1), (0, 2, 5)),))
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    model_fingerprint: str
    layers: tuple[LayerPlan, ...]
    schema_version: int = SCHEMA_VERSION
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def _identity(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "model_fingerprint": self.model_fingerprint,
            "layers": [
                {"index": x.index, "kv_groups": list(x.kv_groups), "channels": list(x.channels)}
                for x in self.layers
            ],
        }

    @property
    def digest(self) -> str:
        """Sha256 over schema, fingerprint and kept units."""
        text = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the plan with its digest and provenance as JSON text."""
        whole = {**self._identity(), "digest": self.digest, "provenance": self.provenance}
        return json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanMismatchError: If a key is missing, unknown or of the wrong type, the schema is
                newer, or the digest does not belong to the kept units.
        """
        try:
            raw = json.loads(
                text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            raise PlanMismatchError(f"plan is not valid JSON: {error}.") from error
        known = {"schema_version", "model_fingerprint", "layers", "digest", "provenance"}
        if not isinstance(raw, dict) or not known - {"digest", "provenance"} <= set(raw) <= known:
            got = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            raise PlanMismatchError(
                f"plan must be an object with the keys {sorted(known)}, got {got}."
            )
        version = raw["schema_version"]
        if not _is_int(version) or not 1 <= version <= SCHEMA_VERSION:
            raise PlanMismatchError(
                f"plan has schema_version {version!r}; this lit_prune reads up to "
                f"{SCHEMA_VERSION}. Update lit_prune, or make the plan again."
            )
        if not isinstance(raw["model_fingerprint"], str) or not isinstance(raw["layers"], list):
            raise PlanMismatchError("plan: model_fingerprint must be text and layers a list.")
        layers = tuple(_layer_from(i, entry) for i, entry in enumerate(raw["layers"]))
        provenance = raw.get("provenance", {})
        if not isinstance(provenance, dict):
            raise PlanMismatchError("plan: provenance must be an object.")
        plan = cls(raw["model_fingerprint"], layers, raw["schema_version"], provenance)
        if "digest" in raw and raw["digest"] != plan.digest:
            raise PlanMismatchError(
                f"plan was altered: its digest is {raw['digest']!r}, its kept units hash to "
                f"{plan.digest}."
            )
        return plan

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read ``plan.json``.

        Raises:
            ArtifactError: If there is no such file, or it is too large or not text.
            PlanMismatchError: If it is not what `to_json` writes.
        """
        try:
            with Path(path).open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
            if len(raw) > _MAX_BYTES:
                raise ArtifactError(f"{path} is larger than {_MAX_BYTES} bytes: it is no plan.")
            return cls.from_json(raw.decode())
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is not UTF-8 text: {error}.") from error
        except PlanMismatchError as error:
            raise PlanMismatchError(f"{path}: {error}") from error
        except ArtifactError:
            raise
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}.") from error

    @classmethod
    def keep_all(cls, spec: DecoderSpec) -> PruningPlan:
        """Return the plan that removes nothing from ``spec``."""
        layers = tuple(
            LayerPlan(
                block.index,
                tuple(range(block.attention.num_units if block.attention else 0)),
                tuple(range(block.mlp.num_units if block.mlp else 0)),
            )
            for block in spec.blocks
        )
        return cls(spec.fingerprint, layers)

    def stack(self, count: int) -> tuple[int, ...]:
        """Return which of its layers are in a stack of ``count`` layers that it has left.

        A layer that keeps nothing leaves the stack, but for the first where it holds the constant
        of what was removed before the first that stays.

        Raises:
            PlanMismatchError: If it leaves no such stack.
        """
        first, *rest = self.layers
        stays = [x.index for x in rest if x.kv_groups or x.channels]
        if first.kv_groups or first.channels or count > len(stays):
            stays.insert(0, first.index)
        if len(stays) != count:
            raise PlanMismatchError(
                f"plan {self.digest[:12]}… leaves {len(stays)} of {len(self.layers)} layers, not "
                f"{count}."
            )
        return tuple(stays)

    def after(self, first: PruningPlan) -> PruningPlan:
        """Return the plan that does at once what ``first`` and then this one do.

        Args:
            first: What was applied before; this plan was made for the model that it has left.

        Returns:
            What both keep, in indices of the model that ``first`` was made for; of the provenance
            only the sizes of that model.

        Raises:
            PlanMismatchError: If this plan keeps what ``first`` has cut.

        Example:
            >>> first = PruningPlan("abc", (LayerPlan(0, (), ()), LayerPlan(1, (0, 2), (1, 3, 4))))
            >>> second = PruningPlan("def", (LayerPlan(0, (1,), (0, 2)),))
            >>> second.after(first).layers[1]
            LayerPlan(index=1, kv_groups=(2,), channels=(1, 4))
        """
        layers = {x.index: LayerPlan(x.index, (), ()) for x in first.layers}
        for index, mine in zip(first.stack(len(self.layers)), self.layers, strict=True):
            had = first.layers[index]
            kinds = ((mine.kv_groups, had.kv_groups), (mine.channels, had.channels))
            if any(max(kept, default=-1) >= len(there) for kept, there in kinds):
                raise PlanMismatchError(
                    f"layer {mine.index} keeps units that plan {first.digest[:12]}… has cut: this "
                    "plan was made for another model."
                )
            layers[index] = LayerPlan(
                index,
                tuple(had.kv_groups[unit] for unit in mine.kv_groups),
                tuple(had.channels[unit] for unit in mine.channels),
            )
        sizes = {k: v for k, v in first.provenance.items() if k == "sizes"}
        return PruningPlan(first.model_fingerprint, tuple(layers.values()), provenance=sizes)

    def validate(self, spec: DecoderSpec) -> None:
        """Refuse a plan that does not fit ``spec``.

        What passes cannot fail in surgery for its content.

        Raises:
            PlanMismatchError: Names the first difference.
        """
        if self.model_fingerprint != spec.fingerprint:
            raise PlanMismatchError(
                f"plan was made for a model with fingerprint {self.model_fingerprint[:12]}…, this "
                f"{spec.model_type} model has {spec.fingerprint[:12]}…: other architecture, "
                "sizes, or already pruned. Load the model that the plan was made for, or make a "
                "new plan."
            )
        if len(self.layers) != len(spec.blocks):
            raise PlanMismatchError(
                f"plan has {len(self.layers)} layers, the model {len(spec.blocks)}."
            )
        for position, (layer, block) in enumerate(zip(self.layers, spec.blocks, strict=True)):
            if layer.index != position:
                raise PlanMismatchError(
                    f"plan entry {position} is for layer {layer.index}; expected {position}."
                )
            sizes = (
                block.attention.num_units if block.attention else 0,
                block.mlp.num_units if block.mlp else 0,
            )
            for what, kept, size in zip(
                ("kv_groups", "channels"), (layer.kv_groups, layer.channels), sizes, strict=True
            ):
                if any(a >= b for a, b in pairwise(kept)):
                    raise PlanMismatchError(
                        f"{what} of layer {position} must be ascending without repeats."
                    )
                if kept and not 0 <= kept[0] <= kept[-1] < size:
                    raise PlanMismatchError(
                        f"{what} of layer {position} must lie in [0, {size}), got {kept[0]} … "
                        f"{kept[-1]}."
                    )
            least = block.mlp.least_units if block.mlp else 0
            if 0 < len(layer.channels) < least:
                raise PlanMismatchError(
                    f"layer {position} keeps {len(layer.channels)} of {sizes[1]} experts, and each "
                    f"token is routed to {least} of them. Keep {least} or more, or none."
                )
            self._refuse_inexact(spec, position, sizes)
        if any(b.attention for b in spec.blocks) and not any(x.kv_groups for x in self.layers):
            raise PlanMismatchError(
                "plan removes every attention sub-block; without one there is no KV cache to "
                "count positions by. Keep at least one KV group in one layer."
            )

    def _refuse_inexact(self, spec: DecoderSpec, position: int, sizes: tuple[int, int]) -> None:
        """Refuse to remove what the family cannot lose exactly."""
        kept = tuple(map(len, (self.layers[position].kv_groups, self.layers[position].channels)))
        mlp = spec.blocks[position].mlp
        unit = mlp.unit if mlp else "channel"
        gone = [not left for left, size in zip(kept, sizes, strict=True) if size]
        removed = {
            "block": bool(gone) and all(gone),
            "sub_block": any(gone) and not all(gone),
            "kv_group": 0 < kept[0] < sizes[0],
            unit: 0 < kept[1] < sizes[1],
        }
        for granularity, reason in spec.refused:
            if removed.get(granularity):
                raise PlanMismatchError(
                    f"layer {position} keeps {kept[0]} of {sizes[0]} KV groups and {kept[1]} of "
                    f"{sizes[1]} {unit}s, which removes a granularity ({granularity!r}) that "
                    f"{spec.model_type} models cannot lose exactly, as {reason}."
                )


def _layer_from(position: int, entry: object) -> LayerPlan:
    if not isinstance(entry, dict) or set(entry) != {"index", "kv_groups", "channels"}:
        raise PlanMismatchError(
            f"plan entry {position} must have index, kv_groups and channels, got {entry!r:.80}."
        )
    for what in ("kv_groups", "channels"):
        if not isinstance(entry[what], list) or not all(_is_int(x) for x in entry[what]):
            raise PlanMismatchError(f"{what} of plan entry {position} must be a list of integers.")
    if not _is_int(entry["index"]):
        raise PlanMismatchError(
            f"index of plan entry {position} must be an integer, got {entry['index']!r}."
        )
    return LayerPlan(entry["index"], tuple(entry["kv_groups"]), tuple(entry["channels"]))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        raise ValueError("a key occurs twice")
    return whole


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
