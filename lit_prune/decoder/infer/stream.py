"""What one decoder layer adds to the residual stream: which modules, behind which norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_prune.decoder.infer.trial import same
from lit_prune.decoder.projections import is_projection

if TYPE_CHECKING:
    from lit_prune.decoder.infer.trial import Call, Trial
    from lit_prune.decoder.spec import SubBlockKind

# Of the few tokens of a trial: one with others before and after it.
MIDDLE = 2


@dataclass(frozen=True, slots=True)
class SubBlockFound:
    """A sub-block as its layer calls it.

    Attributes:
        path: Of its module; of its output projection where it has none.
        inputs: Paths of the projections that read what it is handed, in the order they run.
        output: Path of the projection that writes.
        chain: What runs one after the other, where there is no module of its own.
        norm: Path of the norm in front.
        post_norm: Path of the norm over what it writes.
        adds_residual: Whether it is handed the residual and adds it itself.
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    chain: tuple[str, ...] = ()
    norm: str | None = None
    post_norm: str | None = None
    adds_residual: bool = False


@dataclass(frozen=True, slots=True)
class StreamFound:
    """Both sub-blocks of a layer, and how they are added to its stream.

    Attributes:
        parallel: Whether the MLP reads what enters the layer, not what the attention left.
        scale: What multiplies the output of each before it is added.
    """

    attention: SubBlockFound
    mlp: SubBlockFound
    parallel: bool
    scale: float


def find_stream(trial: Trial) -> StreamFound:
    """Find attention and MLP of a layer, their norms, and confirm that nothing else is added.

    Which sub-block is the attention is told by a change at one token: an MLP shows it at that token
    only. Which norm is whose is told by the numbers that go in and come out. The output of the
    layer must be its input and what the two write, times one factor.

    Raises:
        UnsupportedModelError: Names what is not explained by that.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.decoder.infer.outside import watch
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...                      vocab_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> found = find_stream(watch(LlamaForCausalLM(config)).trial(0))
        >>> found.attention.path, found.mlp.norm, found.parallel, found.scale
        ('self_attn', 'post_attention_layernorm', False, 1.0)
    """
    calls = trial.calls
    found = {_kind(trial, calls, each): each for each in _split(trial, calls)}
    if set(found) != {"attention", "mlp"}:
        (kind,) = found
        raise trial.refusal(f"has two sub-blocks of one kind, {kind}, not attention and MLP")
    inside = tuple(p for each in found.values() for p in (each.path, *each.inputs, each.output))
    outer = {
        path: call
        for path, call in calls.items()
        if path
        and not any(path == part or path.startswith(f"{part}.") for part in inside)
        and not any(part.startswith(f"{path}.") for part in inside)
        and call.entered is not None
        and call.entered.shape[-1] == trial.hidden.shape[-1]
        and call.output.shape[-1] == trial.hidden.shape[-1]
        and not same(call.entered, call.output)  # dropout
    }
    chain = found["mlp"].chain
    outer = {path: call for path, call in outer.items() if path not in chain}
    attention, mlp = (
        _with_norms(trial, calls, outer, kind, found[kind]) for kind in ("attention", "mlp")
    )
    _refuse_unexplained(trial, attention, mlp)
    return _added(trial, calls, attention, mlp)


def _split(trial: Trial, calls: dict[str, Call]) -> tuple[SubBlockFound, SubBlockFound]:
    """Find the two modules that hold projections (or a chain of two, and one module)."""
    every = {n for n, m in trial.layer.named_modules() if is_projection(m)}
    if idle := sorted(every - set(calls)):
        raise trial.refusal(f"does not run {idle[0]}")
    held = _children_with(trial.layer, "", every)
    while len(held) == 1 and next(iter(held)) not in every:
        (path,) = held
        held = _children_with(trial.layer.get_submodule(path), f"{path}.", every)
    modules = {path: inner for path, inner in held.items() if path not in every}
    loose = [path for path in calls if path in held and path in every]
    if len(modules) == 2 and not loose:
        first, second = (_projections(trial, calls, path, inner) for path, inner in modules.items())
        return first, second
    if len(modules) == 1 and len(loose) == 2:
        ((path, inner),) = modules.items()
        mlp = _projections(trial, calls, loose[-1], set(loose))
        chain = _chain(trial, calls, *loose)
        return (
            _projections(trial, calls, path, inner),
            SubBlockFound(mlp.path, mlp.inputs, mlp.output, chain=chain),
        )
    left = [
        f"{name} {list(parameter.shape)}"
        for name, parameter in trial.layer.named_parameters()
        if name.rpartition(".")[0] not in every and parameter.ndim > 1
    ]
    raise trial.refusal(
        "is not made of two modules that hold linear projections, nor of one and two projections "
        f"beside it: {', '.join(held) or 'none has any'}; there are also "
        f"{', '.join(left) or 'no other matrices'}"
    )


def _children_with(owner: nn.Module, prefix: str, every: set[str]) -> dict[str, set[str]]:
    """Return the children of a module that hold (or are) projections, with those."""
    found = {}
    for name, _ in owner.named_children():
        path = f"{prefix}{name}"
        if inner := {p for p in every if p == path or p.startswith(f"{path}.")}:
            found[path] = inner
    return found


def _projections(trial: Trial, calls: dict[str, Call], path: str, inner: set[str]) -> SubBlockFound:
    """Tell the projection that runs last from those before it, which all read one thing."""
    *inputs, output = [each for each in calls if each in inner]
    if not inputs or not all(
        same(calls[each].entered, calls[inputs[0]].entered) for each in inputs
    ):
        raise trial.refusal(
            f"has linear projections in {path} that do not read one hidden state, with one behind "
            f"them: {', '.join((*inputs, output))}"
        )
    if same(calls[output].entered, calls[inputs[0]].entered):
        raise trial.refusal(f"has no output projection in {path}: {output} reads what enters it")
    return SubBlockFound(path, tuple(inputs), output)


def _chain(trial: Trial, calls: dict[str, Call], up: str, down: str) -> tuple[str, ...]:
    """Return what runs from one projection to another; each reads what the one before wrote."""
    order = list(calls)
    chain = [up]
    for path in order[order.index(up) + 1 : order.index(down) + 1]:
        if same(calls[path].entered, calls[chain[-1]].output):
            chain.append(path)
    if chain[-1] != down:
        raise trial.refusal(f"has no modules that lead from {up} to {down}, one after the other")
    return tuple(chain)


def _kind(trial: Trial, calls: dict[str, Call], found: SubBlockFound) -> SubBlockKind:
    changes = {path: trial.moves(None, MIDDLE) for path in found.inputs}
    tokens = trial.shown(changes, found.output).any(1)
    if tokens[:MIDDLE].any():
        raise trial.refusal(f"looks ahead: {found.path} shows a token in those before it")
    if not tokens[MIDDLE]:
        raise trial.refusal(f"writes by {found.output} what {found.inputs} do not reach")
    return "attention" if tokens[MIDDLE + 1 :].any() else "mlp"


def _with_norms(
    trial: Trial,
    calls: dict[str, Call],
    outer: dict[str, Call],
    kind: SubBlockKind,
    found: SubBlockFound,
) -> SubBlockFound:
    """Find the norms around a sub-block, and whether it adds the residual itself."""
    call, output = calls[found.path], calls[found.output].output
    entered = calls[found.inputs[0]].entered if found.chain else call.entered
    if entered is None or not same(entered, calls[found.inputs[0]].entered):
        raise trial.refusal(
            f"hands {found.path} its hidden state neither first nor as 'hidden_states', or "
            f"{found.path} changes it before {found.inputs[0]} reads it"
        )
    if call.returned != (2 if kind == "attention" else 1):
        raise trial.refusal(
            f"gets {call.returned} things from {found.path}: lit_prune stands in for an attention "
            "that returns two (its output first), and for an MLP that returns its output"
        )
    adds = call.residual is not None and same(call.output, output + call.residual)
    if not adds and not same(call.output, output):
        raise trial.refusal(f"has in {found.path} more behind {found.output}")
    front = [path for path, other in outer.items() if same(other.output, entered)]
    # what adds the residual itself hands on the stream, which the next norm reads
    behind = [p for p, other in outer.items() if not adds and same(other.entered, call.output)]
    for where, several in (("in front of", front), ("behind", behind)):
        if len(several) > 1:
            raise trial.refusal(f"has several norms {where} {found.path}: {', '.join(several)}")
    return SubBlockFound(
        found.path, found.inputs, found.output, found.chain,
        next(iter(front), None), next(iter(behind), None), adds,
    )  # fmt: skip


def _refuse_unexplained(trial: Trial, *found: SubBlockFound) -> None:
    explained = {path for each in found for path in (each.norm, each.post_norm, each.path)}
    explained |= {path for each in found for path in (*each.inputs, each.output)}
    for name, parameter in trial.layer.named_parameters():
        if not any(path is not None and name.startswith(f"{path}.") for path in explained):
            raise trial.refusal(
                f"holds the parameter {name} {list(parameter.shape)}, which is no part of "
                f"{' or '.join(each.path for each in found)} and no norm in front of them or "
                "behind them"
            )


def _added(
    trial: Trial, calls: dict[str, Call], attention: SubBlockFound, mlp: SubBlockFound
) -> StreamFound:
    """Confirm that the layer returns its input and what the two write, and nothing else."""
    before, after = trial.hidden, calls[""].output
    reads: dict[SubBlockFound, Tensor] = {}
    writes: dict[SubBlockFound, Tensor] = {}
    for each in (attention, mlp):
        first = calls[each.inputs[0]] if each.chain else calls[each.path]
        read: Any = first.entered if each.norm is None else calls[each.norm].entered
        reads[each] = read.reshape(before.shape)
        writes[each] = calls[each.post_norm or each.output].output.reshape(before.shape)
    if not same(reads[attention], before):
        raise trial.refusal(f"hands {attention.norm or attention.path} another thing than its own "
                            "input: attention is not what reads the stream first")  # fmt: skip
    parallel = same(reads[mlp], before)
    if parallel:
        scale = _scale(after - before, writes[attention] + writes[mlp])
        middle = before
        wanted = before + scale * (writes[attention] + writes[mlp])
    else:
        middle = reads[mlp]
        scale = _scale(middle - before, writes[attention])
        wanted = before + scale * (writes[attention] + writes[mlp])
        if not same(middle, before + scale * writes[attention]):
            raise trial.refusal(
                f"hands {mlp.norm or mlp.path} neither its own input, nor that and what "
                f"{attention.path} writes"
            )
    if not same(after, wanted):
        raise trial.refusal(
            f"returns something else than its input and what {attention.path} and {mlp.path} write"
            f" (largest difference {float((after - wanted).abs().max()):.3g})"
        )
    for each, stream in ((attention, before), (mlp, middle)):
        if each.adds_residual and not same(calls[each.path].residual, stream):
            raise trial.refusal(f"hands {each.path} another residual than its stream")
    if attention.adds_residual != mlp.adds_residual:
        raise trial.refusal("lets one sub-block add the residual, and not the other")
    return StreamFound(attention, mlp, parallel, scale)


def _scale(difference: Tensor, written: Tensor) -> float:
    """Return what multiplies ``written``, if anything does: 1 where it is that but for rounding."""
    scale = float((difference.double() * written.double()).sum() / written.double().square().sum())
    return 1.0 if abs(scale - 1) < 1e-4 else scale
