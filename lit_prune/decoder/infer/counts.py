"""Which numbers an attention's code reads: found by cutting heads from a copy, and comparing."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lit_prune.decoder.infer.cut import same_when_cut
from lit_prune.decoder.infer.trial import same
from lit_prune.decoder.layer_config import LayerConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn

    from lit_prune.decoder.family import Family, HeadCount
    from lit_prune.decoder.infer.trial import Trial

_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "dim_head", "d_head", "kv_channels")
_SHARED_BY = ("num_key_value_groups", "n_rep", "num_queries_per_kv", "q_per_kv")
_OF_A_GROUP = ("kv", "key", "group")
_SPANS = "its norms over queries and keys span all heads, so a head's values depend on the others"
_EACH = "each head has norms of its own, which are not sliced"
_UNLIKE = "an attention of fewer heads does not compute the same for those that stay"


def find_counts(trial: Trial, family: Family, sizes: tuple[int, int, int]) -> Family:
    """Complete an entry by what the attention's code reads, and what cannot be cut from it.

    Groups are cut from a copy, the numbers that its code reads set to what is left: what stays must
    be as it was. Where no choice of numbers makes it so, KV groups are refused.

    Args:
        trial: The layer.
        family: Where its projections are.
        sizes: Head dim, KV groups, query heads per group.

    Raises:
        UnsupportedModelError: If no attribute says a size that is needed, or several readings fit.

    Example:
        >>> from transformers import Phi3Config, Phi3ForCausalLM
        >>> from lit_prune.decoder import Family
        >>> from lit_prune.decoder.infer.outside import watch
        >>> config = Phi3Config(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     vocab_size=32, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0)
        >>> trial = watch(Phi3ForCausalLM(config)).trial(0)
        >>> qkv = dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj")
        >>> sorted(find_counts(trial, Family(model_type="", **qkv), (2, 4, 2)).head_counts)
        ['config.num_attention_heads', 'num_key_value_heads']
    """
    head_dim, groups, queries = sizes
    _refuse_number_of_layer(trial, family.attention)
    numbers = _numbers_read(trial, family.attention)
    own = {k: v for k, v in _own_numbers(trial, family.attention).items() if "." not in k}
    extras, reason = _extras(trial, family, head_dim)
    found = replace(
        family,
        attention_extras=extras,
        head_dim=_named(trial, head_dim, own, numbers, _HEAD_DIMS, "how wide a head is"),
        queries_per_group=next((name for name in _SHARED_BY if own.get(name) == queries), None),
    )
    counted: dict[str, HeadCount] = {}
    for name, value in numbers.items():
        if name not in ("layer_idx", found.head_dim, found.queries_per_group):
            what = _counts(name, value, head_dim, groups, queries)
            if what is not None:
                counted[name] = what
    if reason is None:
        try:
            counts = _counts_that_fit(trial, found, counted, sizes)
        except _Several as error:
            raise trial.refusal(
                f"reads heads from one of several attributes of {family.attention}: {error}"
            ) from error
        if counts is None:
            reason = _UNLIKE
        else:
            found = replace(found, head_counts=counts)
    if reason is not None:
        found = replace(found, refuses={"kv_group": reason})
    return _with_queries(trial, found, own, sizes)


def _refuse_number_of_layer(trial: Trial, path: str) -> None:
    """Need that an attention has a number, for the cache, and computes the same by another."""
    layer = copy.deepcopy(trial.layer)
    attention: Any = layer.get_submodule(path)
    if type(getattr(attention, "layer_idx", None)) is not int:
        raise trial.refusal(f"has no number 'layer_idx' in {path}, by which the cache tells layers")
    attention.layer_idx += 1
    try:
        other = trial.run(layer=layer)[""].output
    except (LookupError, RuntimeError, ValueError):
        other = None
    if not same(trial.calls[""].output, other):
        raise trial.refusal(
            f"computes by {path}.layer_idx, and layers are renumbered when one is removed"
        )


class _Several(Exception):  # noqa: N818 - a finding on its way, no fault
    """More than one choice of attributes fits."""


def _numbers_read(trial: Trial, path: str) -> dict[str, int]:
    """Return the integers that the code of an attention reads when it runs, by attribute."""
    layer = copy.deepcopy(trial.layer)
    attention: Any = layer.get_submodule(path)
    read: set[str] = set()
    kind = type(attention)

    def reading(self: nn.Module, name: str) -> Any:  # noqa: ANN401 - whatever it holds
        read.add(name)
        return super(kind, self).__getattribute__(name)

    if hasattr(attention, "config"):
        attention.config = _Watched(attention.config, read)
    attention.__class__ = type(kind.__name__, (kind,), {"__getattribute__": reading})
    trial.run(layer=layer)
    return {k: v for k, v in _own_numbers(trial, path).items() if k in read}


class _Watched(LayerConfig):
    """A config that remembers what was asked of it."""

    def __init__(self, shared: object, read: set[str]) -> None:
        super().__init__(shared, {})
        self._read = read

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a config holds
        """Return what the config holds."""
        if name != "_read":
            self.__dict__.get("_read", set()).add(f"config.{name}")
        return super().__getattr__(name)


def _own_numbers(trial: Trial, path: str) -> dict[str, int]:
    """Return every integer that an attention or its config holds, by attribute."""
    attention: Any = trial.layer.get_submodule(path)
    found = dict(vars(attention))
    config: Any = found.pop("config", None)
    if config is not None:
        names = {*vars(config), *getattr(config, "attribute_map", {})}
        found |= {f"config.{name}": getattr(config, name, None) for name in names}
    return {k: v for k, v in found.items() if isinstance(v, int) and not isinstance(v, bool)}


def _named(
    trial: Trial,
    value: int,
    own: Mapping[str, int],
    read: Iterable[str],
    names: tuple[str, ...],
    what: str,
) -> str:
    """Return the attribute that says a size: one of a usual name, or else the only one read."""
    fits = [name for name, number in own.items() if number == value]
    usual = [name for name in names if name in fits]
    others = [name for name in fits if name in set(read)] or fits
    if usual:
        return usual[0]
    if len(others) != 1:
        raise trial.refusal(
            f"has {len(others)} attributes of its attention that may say {what} ({value}): "
            f"{', '.join(others) or 'none'}"
        )
    return others[0]


def _counts(name: str, value: int, head_dim: int, groups: int, queries: int) -> HeadCount | None:
    heads = groups * queries
    if value == heads == groups:
        return "groups" if any(word in name for word in _OF_A_GROUP) else "queries"
    known: dict[int, HeadCount] = {heads * head_dim: "width", groups: "groups", heads: "queries"}
    return known.get(value)


def _with_queries(
    trial: Trial, family: Family, own: Mapping[str, int], sizes: tuple[int, int, int]
) -> Family:
    """Complete an entry by what says how many query heads share a key, if its counts do not."""
    _, groups, queries = sizes
    said = {"queries", "groups"} <= set(family.head_counts.values())
    if family.queries_per_group is not None or said or queries == 1:
        return family
    fits = [name for name, value in own.items() if value == queries]
    fits = [name for name in fits if name not in (*family.head_counts, family.head_dim)]
    if len(fits) == 1:
        return replace(family, queries_per_group=fits[0])
    raise trial.refusal(
        f"has {len(fits)} attributes of {family.attention} that may say that {queries} query heads "
        f"share a key ({', '.join(fits) or 'none'}), nor two that its code reads and that say "
        f"{groups * queries} and {groups}"
    )


def _extras(trial: Trial, family: Family, head_dim: int) -> tuple[tuple[str, ...], str | None]:
    """Return the other parameters of an attention, and why they keep its groups from being cut."""
    extras, reason = [], None
    owners = {*family.inputs("attention"), family.attention_output}
    calls = trial.calls
    for name, parameter in trial.layer.get_submodule(family.attention).named_parameters():
        path = f"{family.attention}.{name}"
        owner = path.rpartition(".")[0]
        if owner in owners:
            continue
        call = calls.get(owner)
        if owner == family.attention or call is None or call.output.shape != _shape(call.entered):
            raise trial.refusal(
                f"holds the parameter {path} {list(parameter.shape)}, which is none of a "
                "projection or of a norm"
            )
        extras.append(path)
        if parameter.shape != (head_dim,):
            reason = _SPANS if parameter.ndim == 1 else _EACH
    return tuple(extras), reason


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _counts_that_fit(
    trial: Trial, family: Family, counted: Mapping[str, HeadCount], sizes: tuple[int, int, int]
) -> dict[str, HeadCount] | None:
    """Return the largest set of attributes with which fewer groups compute the same; else None."""
    for size in range(len(counted), -1, -1):
        fits = [
            chosen
            for names in combinations(counted, size)
            if same_when_cut(
                trial, family, "attention", sizes, chosen := {n: counted[n] for n in names}
            )
        ]
        if len(fits) > 1:
            raise _Several("; ".join(", ".join(sorted(each)) for each in fits))
        if fits:
            return _needed(trial, family, fits[0], sizes)
    return None


def _needed(
    trial: Trial, family: Family, counts: dict[str, HeadCount], sizes: tuple[int, int, int]
) -> dict[str, HeadCount]:
    """Leave out what only happens to be the same number: not called after heads, or groups."""
    for name in list(counts):
        if any(word in name for word in ("head", *_OF_A_GROUP)):
            continue
        fewer = {other: what for other, what in counts.items() if other != name}
        if same_when_cut(trial, family, "attention", sizes, fewer):
            counts = fewer
    return counts
