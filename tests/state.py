"""What a test compares before and after: the whole state of a model, and what runs on it."""

import hashlib
import json
from contextlib import contextmanager

import torch


def num_hooks(model):
    """Hooks of any kind, and instance attributes that shadow a forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return hooks + sum("forward" in vars(module) for module in model.modules())


def state_digest(model):
    """Bytes of every parameter and buffer, flags, config, mode, and the number of hooks."""
    whole = hashlib.sha256(repr(num_hooks(model)).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = (name, tensor.dtype, str(tensor.device), tensor.shape, tensor.requires_grad)
        whole.update(repr((*kind, tensor.is_inference())).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    modules = [(name, type(m).__name__, m.training) for name, m in model.named_modules()]
    slots = [getattr(m, "layer_idx", None) for m in model.modules()]
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    settings = getattr(model, "generation_config", None)  # a classifier has none
    generation = json.dumps(settings and settings.to_dict(), sort_keys=True, default=str)
    extra = sorted(vars(model))
    whole.update(repr((modules, slots, config, generation, extra)).encode())
    return whole.hexdigest()


@contextmanager
def unchanged(model):
    """The model leaves the block as it entered it, whatever happened inside."""
    before, state = state_digest(model), torch.random.get_rng_state()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        assert state_digest(model) == before
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.is_grad_enabled() == grad


@contextmanager
def counted_forwards(model):
    """A list that grows by one with each forward of the model or of its decoder stack."""
    calls = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def recount(model):
    """Decoder parameters, all parameters, FLOPs for one token's linears, KV bytes: naively."""
    layers = model.model.layers
    decoder = sum(p.numel() for layer in layers for p in layer.parameters())
    flops = kv_bytes = 0
    query_columns = []
    for name, module in layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            flops += 2 * rows * columns
            if name.endswith(("k_proj", "v_proj")):
                kv_bytes += rows * module.weight.element_size()
            if name.endswith("q_proj"):
                query_columns.append(rows)
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    return {
        "decoder": decoder,
        "total": total,
        "linear_flops": flops,
        "kv_bytes": kv_bytes,
        "query_columns": query_columns,
    }
