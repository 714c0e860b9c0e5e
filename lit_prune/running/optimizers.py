"""Optimizers go on after surgery: what stays keeps its place, its options and its moments."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from lit_prune.surgery import Replaced

    Group = dict[str, Any]


@dataclass(slots=True)
class _Prepared:
    """What one optimizer shall hold: the members of each group, their names, their states."""

    optimizer: Optimizer
    members: list[list[nn.Parameter]]
    names: list[list[str] | None]
    state: dict[Tensor, Any]


@contextmanager
def carried_over(
    optimizers: Sequence[Optimizer], model: nn.Module, replaced: Sequence[Replaced]
) -> Iterator[tuple[str, ...]]:
    """Let optimizers hold the parameters of a model that surgery has changed.

    A new parameter takes the place of the old one in its group, so that options, learning rates and
    schedules go on. Of every state as large as the parameter the same part stays; steps stay. A
    wholly new bias joins the group of the weight that it stands beside, or, where matrices and
    vectors have groups of their own (weight decay), that of the vectors; there it stands in the
    order of the model, as it will when the optimizer is built anew for the pruned model.
    Parameters that no optimizer held stay out.

    If what the ``with`` holds fails, the optimizers are as they were.

    Args:
        optimizers: Of the run.
        model: After the surgery.
        replaced: Where each new parameter comes from, and which ones left.

    Yields:
        In words, whose state could not be carried over.

    Example:
        >>> from lit_prune.surgery import StagedEdits
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
        >>> linear(torch.eye(3)).sum().backward()
        >>> optimizer.step()
        >>> before, edits = list(linear.parameters()), StagedEdits()
        >>> kept = torch.tensor([0, 2])
        >>> edits.parameter(linear, "weight", linear.weight[:, kept], kept=(1, kept))
        >>> edits.commit()
        >>> with carried_over([optimizer], linear, edits.record(before, linear.parameters())):
        ...     optimizer.state[linear.weight]["momentum_buffer"]
        tensor([[1., 1.],
                [1., 1.]])
    """
    dropped: Counter[str] = Counter()
    with torch.inference_mode(False), torch.no_grad():
        prepared = [_prepare(optimizer, model, replaced, dropped) for optimizer in optimizers]
    before = [_snapshot(optimizer) for optimizer in optimizers]
    try:
        for ready in prepared:
            _assign(ready)
        yield tuple(
            f"{name} keeps states of its own shapes: {count} parameters that were cut start anew "
            "in it"
            for name, count in sorted(dropped.items())
        )
    except BaseException:
        for ready in before:
            _assign(ready)
        raise


def _prepare(
    optimizer: Optimizer,
    model: nn.Module,
    replaced: Sequence[Replaced],
    dropped: Counter[str],
) -> _Prepared:
    """Work out what the optimizer shall hold; nothing is changed."""
    went = {id(record.old): record for record in replaced if record.old is not None}
    state: dict[Tensor, Any] = {}
    for parameter, values in optimizer.state.items():
        record = went.get(id(parameter))
        if record is None:
            state[parameter] = values
        elif record.new is not None:
            kept = _part(values, record)
            if kept is None:
                dropped[type(optimizer).__name__] += 1
            else:
                state[record.new] = kept
    groups = optimizer.param_groups
    ready = _Prepared(optimizer, [[] for _ in groups], [None] * len(groups), state)
    home = {}
    for number, group in enumerate(groups):
        names = group.get("param_names")
        ready.names[number] = None if names is None else []
        for place, parameter in enumerate(group["params"]):
            home[id(parameter)] = number
            record = went.get(id(parameter))
            new = parameter if record is None else record.new
            if new is not None:
                ready.members[number].append(new)
                if names is not None:
                    ready.names[number].append(names[place])  # type: ignore[union-attr]
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    vectors = _vectors_apart(groups)
    for record in replaced:
        added = record.new if record.old is None else None
        beside = home.get(id(record.beside))
        if added is not None and beside is not None and added.requires_grad:
            _insert(ready, model, added, beside, vectors, order)
    return ready


def _vectors_apart(groups: Sequence[Group]) -> frozenset[int]:
    """Return the groups for vectors alone, where there is one for matrices alone."""
    kinds = [{parameter.ndim > 1 for parameter in group["params"]} for group in groups]
    if {True} not in kinds:
        return frozenset()
    return frozenset(number for number, kind in enumerate(kinds) if kind <= {False})


def _insert(
    ready: _Prepared,
    model: nn.Module,
    new: nn.Parameter,
    number: int,
    vectors: frozenset[int],
    order: Mapping[int, int],
) -> None:
    """Put a new bias where an optimizer that is built anew would have it."""
    mixed = number not in vectors and any(p.ndim < 2 for p in ready.members[number])
    if vectors and not mixed:
        number = _group_of_vectors(ready, new, vectors, order)
    members, mine = ready.members[number], order[id(new)]
    later = (place for place, p in enumerate(members) if order.get(id(p), -1) > mine)
    place = next(later, len(members))
    members.insert(place, new)
    names = ready.names[number]
    if names is not None:
        names.insert(place, next(name for name, p in model.named_parameters() if p is new))


def _group_of_vectors(
    ready: _Prepared, new: nn.Parameter, vectors: frozenset[int], order: Mapping[int, int]
) -> int:
    """Return the group of the vector that is nearest in the model: norms follow their layer."""
    mine = order[id(new)]
    distances = [
        (order[id(p)] < mine, abs(order[id(p)] - mine), number)
        for number in vectors
        for p in ready.members[number]
        if id(p) in order
    ]
    return min(distances)[2] if distances else min(vectors)


def _part(values: Any, record: Replaced) -> Any:  # noqa: ANN401 - an optimizer's own
    """Return the state of what stays; None where it cannot be cut."""
    if record.dim is None or record.index is None:
        return values
    assert record.old is not None  # noqa: S101 - what was cut was there
    part = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim:
            # a subclass packs its numbers in its own way
            if type(value) is not Tensor or value.shape != record.old.shape:
                return None
            index = record.index.to(value.device)
            part[name] = value.index_select(record.dim, index)
        else:
            part[name] = value
    return part


def _snapshot(optimizer: Optimizer) -> _Prepared:
    groups = optimizer.param_groups
    names = [group.get("param_names") for group in groups]
    return _Prepared(
        optimizer,
        [list(group["params"]) for group in groups],
        [None if name is None else list(name) for name in names],
        dict(optimizer.state),
    )


def _assign(ready: _Prepared) -> None:
    # in place: schedulers, Lightning's wrappers and some optimizers hold these very objects
    for group, members, names in zip(
        ready.optimizer.param_groups, ready.members, ready.names, strict=True
    ):
        group["params"][:] = members
        if names is not None:
            group["param_names"][:] = names
    ready.optimizer.state.clear()
    ready.optimizer.state.update(ready.state)
