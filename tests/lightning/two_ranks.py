"""One of two DDP processes: runs every scenario below, and writes what it saw as JSON.

``python -m tests.lightning.two_ranks FOLDER``, with the variables that launchers set.
"""

import faulthandler
import json
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lit_prune.latency_table
import lit_prune.pruner
import lit_prune.surgery.slicing
from lit_prune import apply_plan
from tests.lightning.modules import (
    LM,
    TRAIN,
    hooks,
    labels_of,
    loader,
    pruner,
    state_digest,
    steady_latency,
    trainer,
)
from tests.models import tiny_model, tiny_rows

RANK = int(os.environ.get("LOCAL_RANK", "0"))
ROWS = tiny_rows(41, 24, seed=4, uneven=True)  # odd: the sampler repeats one
ROADS = [
    ({"preset": "conditional"}, "fit"),
    ({"preset": "conditional"}, "validate"),
    ({"preset": "paper", "estimator": "logdet"}, "fit"),
    ({"preset": "paper", "allocator": "uniform"}, "validate"),
    ({"preset": "llm_pruner", "ratio": 0.3066}, "validate"),
    ({"preset": "shortgpt", "ratio": 0.25}, "validate"),
]


def dense(lr=0.0):
    module = LM(tiny_model(kv_heads=4), lr=lr)
    # else Lightning itself refuses a rank whose loader is empty, on that rank alone
    module.allow_zero_length_dataloader_with_multiple_devices = True
    return module


def ddp(folder, *callbacks, **options):
    return trainer(folder, *callbacks, **{"strategy": "ddp", "devices": 2, **options})


def run(one, module, stage="fit", val=None):
    if stage == "validate":
        return one.validate(module, loader(ROWS) if val is None else val, verbose=False)
    return one.fit(module, loader(TRAIN, 4), loader(ROWS) if val is None else val)


def told(callback, module):
    return {
        "plan": callback.plan_.digest,
        "report": {row.key: [row.before, row.after] for row in callback.report_.rows},
        "warnings": callback.report_.warnings,
        "calibration": callback.report_.calibration,
        "state": state_digest(module),
        "hooks": hooks(module),
    }


def plain(folder):
    """Without the callback: the hooks that DDP itself leaves."""
    module = dense()
    run(ddp(folder), module)
    return {"hooks": hooks(module)}


def roads(folder):
    found = []
    for options, stage in ROADS:
        callback, module = pruner(**{"when": f"{stage}_end" if stage == "fit" else stage, "search_tokens": 400, "replay_batch_tokens": 128, **options}), dense()  # noqa: E501 # fmt: skip
        run(ddp(folder, callback), module, stage)
        found.append(told(callback, module))
    return found


def empty_rank(folder):
    """Rank 1 has no batch to validate on."""
    callback, module = pruner(), dense()
    # DDP broadcasts buffers in every forward of a fit, which an uneven validation cannot join
    strategy = DDPStrategy(broadcast_buffers=False)
    one = ddp(folder, callback, use_distributed_sampler=False, strategy=strategy)
    run(one, module, val=loader(ROWS if RANK == 0 else []))
    return told(callback, module) | {"validations": module.validations}


def empty_rank_validate(folder):
    callback, module = pruner(when="validate"), dense()
    one = ddp(folder, callback, use_distributed_sampler=False)
    run(one, module, "validate", val=loader(ROWS if RANK == 1 else []))
    return told(callback, module)


def capped(folder):
    callback, module = pruner(max_calibration_tokens=400), dense()
    run(ddp(folder, callback), module)
    return told(callback, module) | {
        "rows": len(callback.calibration_.rows.rows),
        "tokens": sum(len(row.ids) for row in callback.calibration_.rows.rows),
    }


def fails(folder, callback, module, *others, stage="fit", **loaded):
    """Run what shall fail: the error, and whether the model and its hooks are as they were."""
    before = state_digest(module)
    distributed = {"use_distributed_sampler": False, "strategy": DDPStrategy(broadcast_buffers=False)} if loaded else {}  # noqa: E501 # fmt: skip
    try:
        run(ddp(folder, *others, callback, **distributed), module, stage, **loaded)
    except Exception as error:
        return {
            "error": [type(error).__name__, str(error)],
            "same": state_digest(module) == before,
            "hooks": hooks(module),
            "pruned": hasattr(callback, "plan_") or hasattr(module.lm, "pruning_record"),
        }
    return {"error": None}


def bad_sample(folder):
    """A sample on rank 1 is longer than the model's context; both are in the same epoch."""
    rows = ROWS[:20] + (tiny_rows(1, 200) if RANK else [])
    return fails(folder, pruner(), dense(), val=loader(rows))


class Poisoned(LM):
    """On rank 1, one channel is infinite in the last validation batch."""

    def validation_step(self, batch, batch_idx):
        weight = self.lm.model.layers[1].mlp.up_proj.weight
        kept = weight.detach().clone()
        if RANK == 1 and batch_idx == 1:
            with torch.no_grad():
                weight[0] = float("inf")
        super().validation_step(batch, batch_idx)
        with torch.no_grad():
            weight.copy_(kept)


def poisoned(folder):
    module = Poisoned(tiny_model(kv_heads=4), lr=0.0)
    return fails(folder, pruner(when="validate"), module, stage="validate")


def too_little(folder):
    """Not enough text on both together."""
    return fails(folder, pruner(min_calibration_tokens=10_000), dense())


def nothing_to_validate(folder):
    return fails(folder, pruner(), dense(), val=loader([]))


@contextmanager
def replaced(rank, owner, name, act):
    """A function of the library replaced, on one rank."""
    real = getattr(owner, name)
    if rank == RANK:
        setattr(owner, name, act)
    try:
        yield
    finally:
        setattr(owner, name, real)


def broken(*args, **kwargs):
    raise ZeroDivisionError("a cosmic ray")


def surgery_on_1(folder):
    with replaced(1, lit_prune.surgery.slicing.StagedEdits, "commit", broken):
        return fails(folder, pruner(), dense())


def planning_on_0(folder):
    with replaced(0, lit_prune.pruner, "make_plan", broken):
        return fails(folder, pruner(), dense())


def measuring_on_0(folder):
    """The model has been cut on both by then."""
    calls, real = [], lit_prune.pruner.measure

    def second(*args):
        calls.append(1)
        return broken() if len(calls) == 2 else real(*args)

    with replaced(0, lit_prune.pruner, "measure", second):
        return fails(folder, pruner(), dense())


def replay_on_1(folder):
    module = sys.modules["lit_prune.calibration.replay"]  # the package's `replay` is the function
    with replaced(1, module, "RecordedRun", broken):
        return fails(folder, pruner(replay_batch_tokens=128), dense())


def other_cut_on_1(folder):
    """Surgery that succeeds on rank 1, and gives another model."""
    real = lit_prune.pruner.applied

    def other(model, plan, compensation):
        made = real(model, plan, compensation)

        class Off:
            def __enter__(self):
                replaced = made.__enter__()
                self.kept = model.lm_head.weight.detach().clone()
                model.lm_head.weight.data[0, 0] += 1
                return replaced

            def __exit__(self, *what):
                model.lm_head.weight.data.copy_(self.kept)
                return made.__exit__(*what)

        return Off()

    with replaced(1, lit_prune.pruner, "applied", other):
        return fails(folder, pruner(), dense())


class Drift(L.Callback):
    def on_fit_end(self, trainer, pl_module):
        if RANK == 1:
            pl_module.lm.lm_head.weight.data[0, 0] += 1


def drifted(folder):
    """Weights that differ before the pruning: each rank keeps its own."""
    callback, module = pruner(), dense()
    found = fails(folder, callback, module, Drift())
    return found | {"widths": [x.mlp.up_proj.out_features for x in module.lm.model.layers]}


def unwritable(folder):
    """Only rank 0 writes, and it may not."""
    (folder / "file").write_text("")
    return fails(folder / "file", pruner(), dense())


def logged(folder):
    callback, module = pruner(), dense()
    logger = TensorBoardLogger(folder, name="tb", version=0)
    run(ddp(folder, callback, logger=logger, max_epochs=2), module)
    return told(callback, module)


def recovery(folder):
    callback, module = pruner(), dense(lr=1e-2)
    averages = WeightAveraging()
    one = ddp(folder, callback, averages)
    run(one, module)
    pruned = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(ddp(folder, callback), module)
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, pruned[name])]
    state = told(callback, module)
    saved = []
    if RANK == 0:
        callback.save_pruned(folder / "saved", verify=False)  # the test itself loads it
        saved = sorted(path.name for path in (folder / "saved").iterdir())
    one.strategy.barrier()
    return state | {"still": sorted(pruned.keys() - set(moved)), "saved": saved, "losses": len(module.losses)}  # noqa: E501 # fmt: skip


def dry(folder):
    callback, module = pruner(dry_run=True), dense()
    run(ddp(folder, callback), module)
    return told(callback, module) | {"dense": not hasattr(module.lm, "pruning_record")}


def rehearsal(folder):
    callback, module = pruner(), dense()
    run(ddp(folder, callback, fast_dev_run=True), module)
    return {"dense": not hasattr(module.lm, "pruning_record"), "hooks": hooks(module)}


def latency_budget(folder):
    callback, module = pruner(budget="latency", latency_prompt_tokens=8, latency_new_tokens=2), dense()  # noqa: E501 # fmt: skip
    with replaced(0, lit_prune.latency_table, "measure_sub_blocks", steady_latency):
        run(ddp(folder, callback), module)
    return {"plan": callback.plan_.digest, "state": state_digest(module)}


class Synced(LM):
    """One number on all ranks, for ModelCheckpoint to go by."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.lm(**batch, labels=labels_of(batch)).loss, sync_dist=True)


def staged(folder):
    """Pruned twice while it trains; DDP is wrapped anew each time."""
    callback, module = pruner([0.15, 0.3], when="epoch_end"), dense(lr=1e-2)
    before = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2 and not batch_idx:
                before.extend(p.detach().clone() for p in pl_module.parameters())

    run(ddp(folder, callback, Watch(), max_epochs=4), module)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    return told(callback, module) | {
        "stages": [report.achieved_ratio for report in callback.reports_],
        "moved": all(moved),
        "losses": module.losses,
    }


def best(folder):
    """The best weights are pruned, and what was pruned resumes in a dense module."""
    kept = ModelCheckpoint(folder / "kept", monitor="val_loss")
    callback, module = pruner(weights="best"), Synced(tiny_model(kv_heads=4), lr=3.0)
    options = {"enable_checkpointing": True}
    run(ddp(folder, callback, kept, max_epochs=3, **options), module)
    again, fresh = Synced(tiny_model(kv_heads=4), lr=1e-3), pruner()
    one = ddp(folder, fresh, max_epochs=5)
    path = folder / "kept" / "pruned.ckpt"
    one.fit(again, loader(TRAIN, 4), loader(ROWS), ckpt_path=path)
    return told(callback, module) | {
        "best": kept.best_model_path,
        "resumed": sum(p.numel() for p in again.parameters()),
        "pruned": sum(p.numel() for p in module.parameters()),
        "again": hasattr(fresh, "report_"),
        "state_again": state_digest(again),
    }


class Sharded(LM):
    """Sharded by FSDP2, as users do it; ``plan`` is applied to the whole model before."""

    def __init__(self, plan=None, **options):
        super().__init__(tiny_model(kv_heads=4), **options)
        self.plan = plan

    def configure_model(self):
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        if self.plan is not None:
            apply_plan(self.lm, self.plan / "plan.json", self.plan / "compensation.safetensors")
        for layer in self.lm.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.lm, mesh=self.device_mesh["data_parallel"])


def sharding(folder, *callbacks, **options):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return trainer(folder, *callbacks, strategy=strategy, devices=2, **options)


def whole(module):
    """What a sharded module holds, hashed."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(module.lm, options=options)
    return state_digest(SimpleNamespace(state_dict=lambda: weights)) if RANK == 0 else ""


def sharded(folder):
    """A whole copy is pruned; its plan is applied before the recovery is sharded."""
    callback, module = pruner(), Sharded(lr=0.0)
    run(sharding(folder, callback), module)
    found = {
        "plan": callback.plan_.digest,
        "warnings": callback.report_.warnings,
        "dense": whole(module),
        "first": state_digest(tiny_model(kv_heads=4)),
        "hooks": hooks(module),
    }
    if RANK == 0:
        callback.save_pruned(folder / "saved", verify=False)
    recovery = Sharded(folder / "pruning", lr=1e-2)
    run(sharding(folder, max_epochs=4), recovery)
    size = sum(p.numel() for p in recovery.lm.parameters())
    return found | {"recovered": size, "losses": recovery.losses}


def sharded_validate(folder):
    callback, module = pruner(when="validate"), Sharded()
    run(sharding(folder, callback), module, "validate")
    return {"plan": callback.plan_.digest}


SCENARIOS = [
    plain, roads, empty_rank, empty_rank_validate, capped, bad_sample, poisoned, too_little,
    nothing_to_validate, surgery_on_1, planning_on_0, measuring_on_0, replay_on_1, other_cut_on_1,
    drifted, unwritable, logged, recovery, dry, rehearsal, latency_budget, staged, best, sharded,
    sharded_validate,
]  # fmt: skip


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    only = os.environ.get("SCENARIOS", "").split()
    for scenario in SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        where = folder / scenario.__name__
        where.mkdir(exist_ok=True)
        print(RANK, scenario.__name__, flush=True)
        faulthandler.dump_traceback_later(240, exit=True)  # a hang
        found[scenario.__name__] = scenario(where)
        (folder / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
