"""Which rows of which weight belong to a unit: projections may be fused, or stored transposed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.decoder.family import Family
    from lit_prune.decoder.spec import SubBlockKind


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear map as ``[out, in]``, or those rows of a fused one that play one role.

    Attributes:
        module: Holds the weight (and bias) as it is stored; hooks go here.
        transposed: Whether it stores ``[in, out]`` (Conv1D of transformers).
        rows: Which outputs each unit owns, ``[units, rows of a unit]``; None where units own
            columns.

    Example:
        >>> fused = nn.Linear(2, 6)  # of two units: a a b b, one row of b for each of a
        >>> a, b = unit_rows((1, 2), 2)
        >>> Projection(fused, False, b).weight.shape, b.tolist()
        (torch.Size([4, 2]), [[2, 3], [4, 5]])
    """

    module: Any
    transposed: bool = False
    rows: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The whole weight, ``[out, in]``: a view."""
        return self.oriented(self.module.weight)

    @property
    def weight(self) -> Tensor:
        """The weight in this role, ``[rows, in]``."""
        return self.matrix if self._is_whole else self.matrix[self._lines()]

    def lines_of(self, units: Sequence[int]) -> Tensor:
        """Return which outputs some units own, unit by unit.

        Example:
            >>> a, b = unit_rows((1, 2), 2)
            >>> Projection(nn.Linear(2, 6), False, b).lines_of([1, 0])
            tensor([4, 5, 2, 3])
        """
        assert self.rows is not None  # noqa: S101 - units own its columns
        return self.rows[list(units)].flatten()

    @property
    def bias(self) -> Tensor | None:
        """The bias in this role, ``[rows]``; None where there is none."""
        bias: Tensor | None = self.module.bias
        return bias if bias is None or self._is_whole else bias[self._lines()]

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        """Rows in this role."""
        return self.matrix.shape[0] if self.rows is None else self.rows.numel()

    def oriented(self, tensor: Tensor) -> Tensor:
        """Turn a stored weight into ``[out, in]``, or one like that into what is stored."""
        return tensor.T if self.transposed else tensor

    def dim(self, *, rows: bool) -> int:
        """Return along which dimension of the stored weight its rows, or its columns, lie."""
        return int(rows == self.transposed)

    def size_names(self) -> tuple[str, str]:
        """Return the attributes of the module that say its rows and its columns."""
        return ("nf", "nx") if self.transposed else ("out_features", "in_features")

    @property
    def _is_whole(self) -> bool:
        return self.rows is None or self.rows.numel() == self.matrix.shape[0]

    def _lines(self) -> Tensor:
        assert self.rows is not None  # noqa: S101 - asked only of a part
        return self.rows.flatten().to(self.module.weight.device)


@lru_cache(maxsize=256)
def unit_rows(
    widths: tuple[int, ...], units: int, *, interleaved: bool = False
) -> tuple[Tensor, ...]:
    """Return the rows of a fused projection that each unit owns in each role.

    Remembered, for a model has many layers of one shape: what is returned is not to be changed.

    Args:
        widths: Rows of a unit, for each role, in the order in which the roles lie there.
        units: How many units there are.
        interleaved: Whether all roles of a unit lie together, unit after unit; otherwise one role
            of all units follows another.

    Returns:
        ``[units, width]`` for each role, on the CPU.

    Example:
        >>> [rows.tolist() for rows in unit_rows((2, 1), 2)]
        [[[0, 1], [2, 3]], [[4], [5]]]
        >>> [rows.tolist() for rows in unit_rows((2, 1), 2, interleaved=True)]
        [[[0, 1], [3, 4]], [[2], [5]]]
    """
    found, before = [], 0
    for width in widths:
        first, step = (before, sum(widths)) if interleaved else (before * units, width)
        starts = first + step * torch.arange(units, device="cpu").unsqueeze(1)
        found.append(starts + torch.arange(width, device="cpu"))
        before += width
    return tuple(found)


def kept_lines(lines: Tensor, kept: Sequence[int]) -> Tensor:
    """Return what some units own, in the order in which it lies there.

    Example:
        >>> kept_lines(torch.tensor([[0, 4], [1, 5], [2, 6]]), (0, 2))
        tensor([0, 2, 4, 6])
    """
    return lines[list(kept)].flatten().sort().values


def role_widths(
    family: Family, kind: SubBlockKind, head_dim: int, queries_per_group: int
) -> dict[str, tuple[int, ...]]:
    """Return the rows of a unit in each role, by the path of the projection that holds them.

    Example:
        >>> from lit_prune.decoder import Family
        >>> fused = Family(model_type="x", query="qkv", key="qkv", value="qkv")
        >>> role_widths(fused, "attention", 8, 2), role_widths(fused, "mlp", 8, 2)
        ({'qkv': (16, 8, 8)}, {'mlp.gate_proj': (1,), 'mlp.up_proj': (1,)})
    """
    roles = family.roles(kind)
    widths = (1,) * len(roles)
    if kind == "attention":
        widths = (queries_per_group * head_dim, head_dim, head_dim)
    found: dict[str, tuple[int, ...]] = {}
    for path, width in zip(roles, widths, strict=True):
        found[path] = (*found.get(path, ()), width)
    return found


def rows_by_role(
    family: Family, kind: SubBlockKind, units: int, head_dim: int, queries_per_group: int
) -> dict[str, tuple[Tensor, ...]]:
    """Return the rows that each unit owns, ``[units, width]`` for each role, by path."""
    interleaved = family.interleaved and kind == "attention"
    widths = role_widths(family, kind, head_dim, queries_per_group)
    return {path: unit_rows(each, units, interleaved=interleaved) for path, each in widths.items()}


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is a linear map with a plain weight.

    Example:
        >>> is_projection(nn.Linear(2, 2)), is_projection(nn.LayerNorm(2))
        (True, False)
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Return whether a module computes what its weight and bias say, and nothing else.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> is_plain(linear)
        True
        >>> linear.forward = lambda x: 2 * x
        >>> is_plain(linear)
        False
    """
    from transformers.pytorch_utils import Conv1D

    own = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return own and "forward" not in vars(module)


def stores_transposed(module: nn.Module) -> bool:
    """Return whether a projection stores its weight as ``[in, out]``."""
    return is_projection(module) and not isinstance(module, nn.Linear)
