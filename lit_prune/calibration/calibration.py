"""What a calibration is worth keeping: enough to plan again without a forward pass."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prune.calibration.bypass import Unit
from lit_prune.calibration.rows import Row, RowSet
from lit_prune.errors import ArtifactError, CalibrationError
from lit_prune.whole_file import whole_file

if TYPE_CHECKING:
    from lit_prune.calibration.needs import Needs
    from lit_prune.calibration.observer import Probed
    from lit_prune.calibration.replay import Replayed

_SCHEMA = 2
_READABLE = (1, _SCHEMA)  # 1 did not say which weights it was made on
# Statistics that are one tensor for each sub-block.
_BY_PLACE = ("covariances", "held_out", "curves", "sensitivities", "taylor", "inputs", "latency")
# What a latency table says it was measured under.
_CONDITIONS = {
    "device",
    "dtype",
    "batch_size",
    "prompt_tokens",
    "new_tokens",
    "warmup",
    "repetitions",
}
# What reading a file that is something else may raise.
_UNREADABLE = (
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Statistics of one model over one set of samples, and the samples.

    Attributes:
        model_fingerprint: Architecture that the statistics belong to.
        rows: The distinct samples, split by content.
        units: Mean and variance of the input of every output projection over the calibrate side, by
            ``(layer, kind)``, ``[width]`` each, float64; of experts, of what each adds to the
            stream, ``[experts * hidden_size]``.
        full: Variance (or covariance) of the final hidden state, ``[hidden_size]``; None before a
            replay.
        bypassed: The same with each block, attention and MLP bypassed.
        changes: Mean squared Euclidean norm of the change of that state by each bypass, scalars.
        covariances: Covariance of the inputs that ``units`` describes, ``[width, width]`` each; of
            experts, mean inner products of what they add, ``[experts, experts]``.
        held_out: Second moments of the same inputs on the choose side, about the same means.
        curves: Damage curve of each sub-block, ``[units + 1, 3]``: in row r the unit that leaves as
            r-th (-1 in row 0), and the expected squared output error when r have left, compensated
            by the conditional mean and by the mean alone (twice without, of experts).
        sensitivities: For each sub-block, `SENSITIVITIES`, ``[3]``.
        taylor: For each sub-block, `TAYLOR_SCORES` of every unit, ``[units, scores]``.
        similarities: Mean cosine of each block's input and output, ``[layers]``.
        inputs: Second moment of the input of each sub-block (after its norm), ``[hidden_size]``.
        latency: Measured time of each sub-block, rows of (kept units, seconds), ``[widths, 2]``.
        latency_conditions: What that was measured under: device, dtype, batch, tokens, repetitions.
        target: Where that state was read, ``after_norm`` or ``before_norm``.
        source: Where ``units`` come from: ``validation loop`` or ``replay``.
        notes: What the report says about the text, in words.
        weights_digest: The weights that the statistics belong to; None where it was not taken: as
            observed in a validation, before what follows it.
    """

    model_fingerprint: str
    rows: RowSet
    units: dict[Probed, tuple[Tensor, Tensor]]
    full: Tensor | None = None
    bypassed: dict[Unit, Tensor] | None = None
    changes: dict[Unit, Tensor] | None = None
    covariances: dict[Probed, Tensor] | None = None
    held_out: dict[Probed, Tensor] | None = None
    curves: dict[Probed, Tensor] | None = None
    sensitivities: dict[Probed, Tensor] | None = None
    taylor: dict[Probed, Tensor] | None = None
    similarities: Tensor | None = None
    inputs: dict[Probed, Tensor] | None = None
    latency: dict[Probed, Tensor] | None = None
    latency_conditions: dict[str, Any] = field(default_factory=dict)
    target: str = "after_norm"
    source: str = "validation loop"
    notes: tuple[str, ...] = ()
    weights_digest: str | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens behind the statistics."""
        return self.rows.num_tokens("calibrate")

    @property
    def tokens_per_channel(self) -> float | None:
        """Real tokens for each channel of the widest covariance; None without covariances."""
        widest = max(map(len, (self.covariances or {}).values()), default=0)
        return round(self.num_tokens / widest, 2) if widest else None

    @property
    def data_digest(self) -> str:
        """Sha256 over the digests of the samples: which text it was, in no order."""
        return hashlib.sha256(
            "".join(sorted(r.digest for r in self.rows.rows)).encode()
        ).hexdigest()

    def with_replay(self, replayed: Replayed) -> Self:
        """Return this calibration with what a replay measured."""
        return replace(
            self,
            units=replayed.units,
            full=replayed.full,
            bypassed=replayed.bypassed or None,
            changes=replayed.changes or None,
            covariances=replayed.covariances or None,
            target=replayed.target,
            source="replay",
        )

    def lacks(self, needs: Needs) -> tuple[str, ...]:
        """Return the names of statistics that are asked for and not there."""
        wanted = {
            "covariances": needs.covariances,
            "curves": needs.curves,
            "changes": needs.changes,
            "sensitivities": needs.sensitivities,
            "taylor": needs.taylor,
            "similarities": needs.residuals,
            "latency": needs.latency,
        }
        return tuple(name for name, here in wanted.items() if here and getattr(self, name) is None)

    def describe(self) -> dict[str, Any]:
        """Return what a report and a model card state about the calibration text."""
        lengths = [len(row.ids) for row in self.rows.rows]
        return {
            "samples": len(lengths),
            "tokens": {
                side: self.rows.num_tokens(side) for side in ("calibrate", "choose", "score")
            },
            "longest_sample": max(lengths, default=0),
            "tokens_per_channel": self.tokens_per_channel,
            "data_digest": self.data_digest,
            "split": self.rows.describe_split(),
            "disjoint_sides": self.rows.split,
            "statistics_from": self.source,
            "notes": list(self.notes),
            **({"latency_table": self.latency_conditions} if self.latency else {}),
        }

    def require(self, minimum: int) -> None:
        """Refuse too little text.

        Raises:
            CalibrationError: If the calibrate side has fewer than ``minimum`` real tokens, or the
                score side none that a perplexity counts. (A classifier can be pruned without
                labels: its quality is not measured then.)
        """
        if self.num_tokens < max(minimum, 2):
            raise CalibrationError(
                f"{self.num_tokens} real tokens in {len(self.rows.side('calibrate'))} samples to "
                f"calibrate on, expected at least {max(minimum, 2)} (min_calibration_tokens). "
                "Give more validation text."
            )
        if not self.rows.classifies and not self.rows.num_scored("score"):
            raise CalibrationError(
                f"0 of the {self.rows.num_tokens('score')} real tokens in "
                f"{len(self.rows.side('score'))} samples on the score side can be scored: a token "
                "is where its label is not -100 and one precedes it in its sample. There would be "
                "no perplexity. Give longer samples, or labels that score some tokens."
            )

    def save(self, path: str | Path) -> None:
        """Write ``calibration.safetensors``: statistics and token ids, no pickle."""
        tensors: dict[str, Tensor] = {
            "rows.ids": torch.cat([row.ids for row in self.rows.rows]),
            "rows.scored": torch.cat([row.scored for row in self.rows.rows]),
            "rows.lengths": torch.tensor([len(row.ids) for row in self.rows.rows]),
        }
        if labels := [row.labels for row in self.rows.rows if row.labels is not None]:
            tensors["rows.labels"] = torch.cat(labels)
        for (layer, kind), (mean, variance) in self.units.items():
            tensors[f"units.{layer}.{kind}.mean"] = mean
            tensors[f"units.{layer}.{kind}.variance"] = variance
        if self.full is not None:
            tensors["state.full"] = self.full
        for unit, state in (self.bypassed or {}).items():
            tensors[f"state.{unit.layer}.{unit.kind}"] = state
        for unit, change in (self.changes or {}).items():
            tensors[f"change.{unit.layer}.{unit.kind}"] = change
        for name in _BY_PLACE:
            for (layer, kind), tensor in (getattr(self, name) or {}).items():
                tensors[f"{name}.{layer}.{kind}"] = tensor
        if self.similarities is not None:
            tensors["similarities"] = self.similarities
        header = {
            "schema_version": _SCHEMA,
            "model_fingerprint": self.model_fingerprint,
            "source": self.source,
            "target": self.target,
            "notes": list(self.notes),
            "latency_conditions": self.latency_conditions,
            "weights_digest": self.weights_digest,
        }
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"lit_prune": json.dumps(header, allow_nan=False)}
        with whole_file(path) as beside:
            save_file(whole, beside, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ArtifactError: If the file is not a calibration of a version that is known here.
        """
        if not Path(path).is_file():
            raise ArtifactError(f"{path}: there is no such file.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["lit_prune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            version = header["schema_version"]
            if version in _READABLE:
                return cls._from(header, tensors)
        except _UNREADABLE as error:
            raise ArtifactError(f"{path} is not a calibration of lit_prune: {error!r}.") from error
        raise ArtifactError(
            f"{path} has schema_version {version}, expected at most {_SCHEMA}. Calibrate again."
        )

    @classmethod
    def _from(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
        lengths = tensors["rows.lengths"].tolist()
        names = ("rows.ids", "rows.scored", *(("rows.labels",) if "rows.labels" in tensors else ()))
        rows = [tensors[name].split(lengths) for name in names]
        units: dict[Probed, tuple[Tensor, Tensor]] = {}
        bypassed: dict[Unit, Tensor] = {}
        changes: dict[Unit, Tensor] = {}
        by_place: dict[str, dict[Probed, Tensor]] = {}
        for name, tensor in tensors.items():
            match name.split("."):
                case ["units", layer, ("attention" | "mlp") as kind, "mean"]:
                    units[int(layer), kind] = (tensor, tensors[f"units.{layer}.{kind}.variance"])
                case ["state", layer, ("block" | "attention" | "mlp") as kind]:
                    bypassed[Unit(int(layer), kind)] = tensor
                case ["change", layer, ("block" | "attention" | "mlp") as kind]:
                    changes[Unit(int(layer), kind)] = tensor
                case [group, layer, ("attention" | "mlp") as kind] if group in _BY_PLACE:
                    by_place.setdefault(group, {})[int(layer), kind] = tensor
        weights = header.get("weights_digest")
        texts = (header["model_fingerprint"], header["source"], header["target"], *header["notes"])
        texts += () if weights is None else (weights,)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text in its header is none")
        conditions = dict(header.get("latency_conditions", {}))
        if "latency" in by_place and not conditions.keys() >= _CONDITIONS:
            raise KeyError("latency_conditions")
        return cls(
            model_fingerprint=header["model_fingerprint"],
            rows=RowSet.of(Row.of(*row) for row in zip(*rows, strict=True)),
            units=dict(sorted(units.items())),
            full=tensors.get("state.full"),
            bypassed=dict(sorted(bypassed.items())) or None,
            changes=dict(sorted(changes.items())) or None,
            similarities=tensors.get("similarities"),
            **{group: dict(sorted(found.items())) for group, found in by_place.items()},
            latency_conditions=conditions,
            target=header["target"],
            source=header["source"],
            notes=tuple(header["notes"]),
            weights_digest=weights,
        )
