"""The obvious way to measure what the package measures: row by row, unpadded, whole forwards."""

from contextlib import contextmanager

import torch

from lit_prune.calibration import Row, RowSet
from tests.models import tiny_rows

KINDS = ("attention", "mlp")


def uneven_rows(count=24, **options):
    """Rows of several lengths, so that every batch of the package is padded."""
    return RowSet.of(map(Row.of, tiny_rows(count, uneven=True, **options)))


def output_of(model, layer, kind):
    block = model.model.layers[layer]
    return block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj


def inputs_of(model, layer, kind):
    block = model.model.layers[layer]
    if kind == "attention":
        return [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    return [block.mlp.gate_proj, block.mlp.up_proj]


def places_of(model):
    return [(layer, kind) for layer in range(len(model.model.layers)) for kind in KINDS]


@torch.no_grad()
def captured(model, rows, side="calibrate"):
    """What passed, ``[tokens, width]`` in float64.

    ``writes``: input of each output projection, ``reads``: input of each input projection, both by
    ``(layer, kind)``; ``enters`` and ``leaves``: the residual stream around each layer.
    """
    found = {name: {} for name in ("writes", "reads", "enters", "leaves")}

    def keep(group, key, tensor):
        found[group].setdefault(key, []).append(tensor[0].double())

    def around(layer):
        def hook(_module, args, kwargs, output):
            keep("enters", layer, args[0] if args else kwargs["hidden_states"])
            keep("leaves", layer, output if isinstance(output, torch.Tensor) else output[0])

        return hook

    def before(group, place):
        return lambda _module, args: keep(group, place, args[0])

    handles = []
    for place in places_of(model):
        write, read = output_of(model, *place), inputs_of(model, *place)[-1]
        handles.append(write.register_forward_pre_hook(before("writes", place)))
        handles.append(read.register_forward_pre_hook(before("reads", place)))
    for layer, block in enumerate(model.model.layers):
        handles.append(block.register_forward_hook(around(layer), with_kwargs=True))
    for row in rows.side(side):
        model(input_ids=row.ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        group: {key: torch.cat(parts) for key, parts in by_key.items()}
        for group, by_key in found.items()
    }


@torch.no_grad()
def mean_nll(model, rows, side="calibrate"):
    """Mean loss of a next token, nats."""
    total, count = 0.0, 0
    for row in rows.side(side):
        logits = model(input_ids=row.ids[None], use_cache=False).logits[0, :-1].double()
        picked = logits.log_softmax(-1)[torch.arange(len(row.ids) - 1), row.ids[1:]]
        total, count = total - float(picked.sum()), count + len(picked)
    return total / count


class Zero(torch.nn.Module):
    """Stands in for a removed attention or MLP, in the module tree itself."""

    def __init__(self, kind, constant=None):
        super().__init__()
        self.kind, self.constant = kind, constant

    def forward(self, hidden_states, *_args, **_kwargs):
        out = torch.zeros_like(hidden_states)
        if self.constant is not None:
            out = out + self.constant.to(out)
        return (out, None) if self.kind == "attention" else out


@contextmanager
def deleted(model, *places, constants=None):
    """The model without these attentions and MLPs (or with constants in their stead)."""
    undo = []
    for layer, kind in places:
        owner, name = model.model.layers[layer], "self_attn" if kind == "attention" else "mlp"
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, Zero(kind, (constants or {}).get((layer, kind))))
    try:
        yield
    finally:
        for owner, name, old in undo:
            setattr(owner, name, old)


@contextmanager
def zeroed(model, cut, width):
    """The model with the columns of cut units zeroed; ``width`` columns to a KV group."""
    undo = []
    for (layer, kind), units in cut.items():
        linear = output_of(model, layer, kind)
        undo.append((linear, linear.weight.data.clone()))
        for unit in units:
            each = width if kind == "attention" else 1
            linear.weight.data[:, unit * each : (unit + 1) * each] = 0
    try:
        yield
    finally:
        for linear, old in undo:
            linear.weight.data.copy_(old)
