"""Which rows and columns of a sub-block belong to a unit: found by changing rows, and watching."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lit_prune.decoder.family import Family
from lit_prune.decoder.infer.cut import same_when_cut
from lit_prune.decoder.infer.stream import MIDDLE
from lit_prune.decoder.infer.trial import same
from lit_prune.decoder.projections import Projection, rows_by_role, stores_transposed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lit_prune.decoder.infer.stream import SubBlockFound
    from lit_prune.decoder.infer.trial import Trial

_UNLIKE = "an MLP of fewer channels does not compute the same for those that stay"
_ROLES = ("query", "key", "value")
# What a role shows when it is changed at the first token: at none, behind it, or there too. The
# first token sees one key only, its own: no query and no key changes what it attends to.
_SHOWS = {(False, False): "query", (False, True): "key", (True, True): "value"}


def find_channels(trial: Trial, found: SubBlockFound) -> Family:
    """Find gate and up of an MLP, and confirm that its channels do not depend on each other.

    The gate is the one whose doubling does not double the product; where neither's does, or both',
    it is the one that runs first. For pruning they are alike: a channel owns one row of each.

    Returns:
        An entry whose MLP fields hold.

    Raises:
        UnsupportedModelError: If shapes do not fit, or a channel's rows show in another channel.
    """
    hidden = trial.hidden.shape[-1]
    channels = _matrix(trial, found.output).shape[1]
    rows = [_matrix(trial, path).shape[0] for path in found.inputs]
    if _matrix(trial, found.output).shape[0] != hidden or rows not in (
        [channels], [2 * channels], [channels, channels],
    ):  # fmt: skip
        raise trial.refusal(_shapes(trial, found, "which are no gate and up of one width"))
    roles = found.inputs * (2 if rows == [2 * channels] else 1)
    calls = trial.calls
    if len(set(roles)) == 2:
        linear = [
            same(
                trial.run({path: lambda output: 2 * output})[found.output].entered,
                _twice(calls[found.output].entered),
            )
            for path in roles
        ]
        roles = roles[::-1] if linear == [True, False] else roles
    family = Family(
        model_type="", transposed=_transposed(trial, found), mlp=found.path,
        mlp_output=found.output, up=roles[-1],
        gate=roles[0] if len(roles) == 2 else None, mlp_chain=found.chain,
    )  # fmt: skip
    by_path = rows_by_role(family, "mlp", channels, 1, 1)
    some = _some(trial, channels)
    changes = {
        path: trial.moves(torch.cat(each, 1)[some].flatten(), MIDDLE)
        for path, each in by_path.items()
    }
    shown = trial.shown(changes, found.output).any(0).cpu()
    outside = [each for each in shown.nonzero().flatten().tolist() if each not in some.tolist()]
    if outside or not shown.any():  # an activation may hide a channel
        raise trial.refusal(
            _shapes(
                trial, found,
                "whose channels depend on each other, or lie in another order than one row each: "
                f"rows of {some.tolist()[:4]}… were changed, channels {outside[:4]} show it",
            )
        )  # fmt: skip
    if not same_when_cut(trial, family, "mlp", (1, channels, 1)):
        return replace(family, refuses={"channel": _UNLIKE})
    return family


def find_heads(trial: Trial, found: SubBlockFound) -> tuple[Family, int, int, int]:
    """Find query, key and value of an attention, how wide a head is, and how many share a key.

    Rows of each role are changed at one token. A query shows at that token only, a key at later
    ones, a value at that one too; one row of a query shows in the columns of its head. Where the
    three are fused, both orders are tried, and one must explain what shows.

    Returns:
        An entry whose projections hold; head dim, KV groups, query heads per group.

    Raises:
        UnsupportedModelError: If no reading, or more than one, explains what shows.
    """
    width = _matrix(trial, found.output).shape[1]
    rows = {path: _matrix(trial, path).shape[0] for path in found.inputs}
    fused = len(rows) == 1
    roles = dict.fromkeys(_ROLES, found.inputs[0])
    if not fused:
        roles = {_role(trial, found, path): path for path in found.inputs}
        if set(roles) != set(_ROLES) or len(rows) != 3:
            told = ", ".join(f"{path} as {role}" for role, path in roles.items())
            raise trial.refusal(_shapes(trial, found, f"which act as: {told}"))
    family = Family(
        model_type="", transposed=_transposed(trial, found), attention=found.path,
        attention_output=found.output, query=roles["query"], key=roles["key"],
        value=roles["value"],
    )  # fmt: skip
    taps = {path: tap_of(trial, path) for path in rows}
    first = {taps[family.query]: trial.moves(torch.tensor([0]), MIDDLE)}
    columns = trial.shown(first, found.output)[MIDDLE].nonzero().flatten().tolist()
    head_dim = len(columns)
    cached = (rows[family.query] - width) // 2 if fused else rows[family.key]
    if (
        columns != list(range(head_dim)) or not head_dim or cached <= 0
        or width % head_dim or cached % head_dim or width % cached
        or {rows[family.query], rows[family.key], rows[family.value]}
        != ({width + 2 * cached} if fused else {width, cached})
    ):  # fmt: skip
        raise trial.refusal(_shapes(trial, found, f"of which the first row shows in {columns}"))
    groups = cached // head_dim
    if groups < 2:
        raise trial.refusal(
            f"has one KV group in {found.path}: how its class tells groups apart does not show. "
            "Infer from a tiny model of the class with two or more (num_key_value_heads)"
        )
    sizes = groups, head_dim, width // cached
    fits = [
        entry
        for layout in ((False, True) if fused else (False,))
        if _explains(trial, entry := replace(family, interleaved=layout), taps, sizes)
    ]
    if len(fits) != 1:
        raise trial.refusal(_shapes(
            trial, found, f"as {groups} KV groups of {sizes[2]} query heads of {head_dim}: "
            "groups that are changed show in others, in whatever order their rows are read",
        ))  # fmt: skip
    return fits[0], head_dim, groups, sizes[2]


def tap_of(trial: Trial, path: str) -> str:
    """Return where rows of a projection can be changed alone: behind a norm over all of them.

    Example:
        >>> from transformers import Olmo2Config, Olmo2ForCausalLM
        >>> from lit_prune.decoder.infer.outside import watch
        >>> config = Olmo2Config(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...                      vocab_size=32, num_attention_heads=4, pad_token_id=0)
        >>> trial = watch(Olmo2ForCausalLM(config)).trial(0)
        >>> tap_of(trial, "self_attn.q_proj"), tap_of(trial, "self_attn.v_proj")
        ('self_attn.q_norm', 'self_attn.v_proj')
    """
    calls = trial.calls
    output = calls[path].output
    for other, call in calls.items():
        owned = next(trial.layer.get_submodule(other).parameters(recurse=False), None)
        if (
            other != path and owned is not None and call.entered is not None
            and call.entered.shape == output.shape and same(call.entered, output)
            and not same(call.output, output)
        ):  # fmt: skip
            return other
    return path


def _role(trial: Trial, found: SubBlockFound, path: str) -> str:
    tap = tap_of(trial, path)
    at_first = trial.shown({tap: trial.moves(None, 0)}, found.output).any(1)
    return _SHOWS.get((bool(at_first[0]), bool(at_first[1:].any())), "none of the three")


def _explains(
    trial: Trial, family: Family, taps: Mapping[str, str], sizes: tuple[int, int, int]
) -> bool:
    """Return whether the rows of each role show in their groups' columns, and in no others."""
    output = family.attention_output
    groups, head_dim, queries = sizes
    found = rows_by_role(family, "attention", groups, head_dim, queries)
    some = _some(trial, groups)
    wanted = torch.zeros(groups, head_dim * queries, dtype=torch.bool)
    wanted[some] = True
    left = {path: list(each) for path, each in found.items()}
    for role, path in zip(_ROLES, family.roles("attention"), strict=True):
        rows = left[path].pop(0)[some].flatten()
        tap = taps[path]
        at_first = trial.shown({tap: trial.moves(rows, 0)}, output)
        inside = trial.shown({tap: trial.moves(rows, MIDDLE)}, output)
        shows = bool(at_first[0].any()), bool(at_first[1:].any())
        later = bool(inside[MIDDLE + 1 :].any())
        if (
            not _shows_in(inside.any(0), wanted)
            or _SHOWS.get(shows) != role
            or later == (role == "query")
        ):
            return False
    return True


def _shows_in(columns: Tensor, units: Tensor) -> bool:
    """Return whether what shows lies in the units that were changed, and in each of them.

    Args:
        columns: Which columns show something.
        units: Which columns belong to changed units, ``[units, columns of a unit]``.
    """
    shown = columns.cpu().reshape(units.shape)
    return not bool((shown & ~units).any()) and bool(shown[units.any(1)].any(1).all())


def _some(trial: Trial, units: int) -> Tensor:
    """Return about half of the units, drawn, at least one, not all."""
    return torch.randperm(units, generator=trial.numbers)[: max(1, units // 2)].sort().values


def _matrix(trial: Trial, path: str) -> Tensor:
    module = trial.layer.get_submodule(path)
    return Projection(module, stores_transposed(module)).matrix


def _transposed(trial: Trial, found: SubBlockFound) -> bool:
    """Return whether projections store ``[in, out]``; all of them do, or none."""
    stored = {
        stores_transposed(trial.layer.get_submodule(path)) for path in (*found.inputs, found.output)
    }
    if len(stored) != 1:
        raise trial.refusal(_shapes(trial, found, "some of them stored the other way round"))
    return stored.pop()


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else 2 * tensor


def _shapes(trial: Trial, found: SubBlockFound, otherwise: str) -> str:
    shapes = ", ".join(
        f"{path} {list(_matrix(trial, path).shape)}" for path in (*found.inputs, found.output)
    )
    return f"has in {found.path} the projections {shapes}, {otherwise}"
