"""Perplexity against a plain float64 loop, on every dtype, padding and label mask."""

import json
import math
import pickle
from dataclasses import asdict

import pytest
import torch
from torch import nn

from lit_prune.errors import CalibrationError, ConfigError
from lit_prune.metrics import Perplexity, perplexity_of
from lit_prune.metrics import nll as nll_module
from tests.models import padded_batch, tiny_model, tiny_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(logits, ids, mask=None, labels=None):
    """(sum of NLL in float64, tokens), one token after the other."""
    total, count = 0.0, 0
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if mask is not None and not (mask[row, t] and mask[row, t + 1]):
                continue
            if labels is not None and labels[row, t + 1] == -100:
                continue
            z = logits[row, t].double()
            top = z.max()
            total += float(top + (z - top).exp().sum().log() - z[ids[row, t + 1]])
            count += 1
    return total, count


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def batch(rng):
    ids = torch.randint(0, 50, (4, 9), generator=rng)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, :3] = 0  # left
    mask[1, 6:] = 0  # right
    mask[2, :8] = 0  # one real token: nothing to score
    labels = ids.clone()
    labels[mask == 0] = -100
    labels[3, :4] = -100  # a prompt that is not scored
    return torch.randn(4, 9, 50, generator=rng) * 5, ids, mask, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_labels", [True, False])
def test_equals_a_float64_loop(batch, dtype, with_labels):
    logits, ids, mask, labels = batch
    logits = logits.to(dtype)
    labels = labels if with_labels else None
    metric = Perplexity()
    metric.update(logits, ids, attention_mask=mask, labels=labels)
    total, count = naive(logits, ids, mask, labels)
    result = metric.result()
    assert result.num_tokens == count
    # float32 log-softmax of values up to ~20: relative error of one token about 1e-7
    assert result.mean_nll == pytest.approx(total / count, rel=1e-6)
    assert float(metric.compute()) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_label_mask_says_the_same_as_labels(batch):
    logits, ids, mask, labels = batch
    one, other = Perplexity(), Perplexity()
    one.update(logits, ids, attention_mask=mask, labels=labels)
    other.update(logits, ids, attention_mask=mask, label_mask=labels != -100)
    assert one.result() == other.result()


def test_counts_describe_the_real_tokens(batch):
    logits, ids, mask, _ = batch
    metric = Perplexity()
    metric.update(logits, ids, attention_mask=mask)
    metric.update(logits[:1], ids[:1], attention_mask=torch.zeros(1, 9))
    result = metric.result()
    assert (result.num_real_tokens, result.num_rows, result.context_length) == (22, 4, 9)
    assert (metric.num_tokens, metric.mean_nll) == (result.num_tokens, result.mean_nll)


def test_chunks_change_nothing(batch, monkeypatch):
    logits, ids, mask, _ = batch
    whole, parts = Perplexity(), Perplexity()
    whole.update(logits, ids, attention_mask=mask)
    monkeypatch.setattr(nll_module, "_CHUNK_VALUES", 3 * 50)
    parts.update(logits, ids, attention_mask=mask)
    assert parts.result() == whole.result()


def test_no_full_float32_copy_of_a_long_batch(monkeypatch):
    monkeypatch.setattr(nll_module, "_CHUNK_VALUES", 8 * 1000)
    sizes = []
    original = nll_module.functional.cross_entropy
    monkeypatch.setattr(
        nll_module.functional,
        "cross_entropy",
        lambda z, *a, **k: sizes.append(z.shape[0]) or original(z, *a, **k),
    )
    metric = Perplexity()
    metric.update(torch.zeros(2, 33, 1000, dtype=torch.bfloat16), torch.zeros(2, 33).long())
    assert sizes == [8] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_f22_random_32k_vocabulary_is_right_in_half_precision(dtype, rng):
    logits = (torch.randn(1, 24, 32_000, generator=rng) * 4).to(dtype)
    ids = torch.randint(0, 32_000, (1, 24), generator=rng)
    metric = Perplexity()
    metric.update(logits, ids)
    total, count = naive(logits, ids)
    assert metric.mean_nll == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)]
)
def test_f22_huge_logits_give_a_finite_nll_and_infinity_only_from_exp(dtype, size):
    logits = torch.zeros(1, 3, 4, dtype=dtype)
    logits[..., 0], logits[..., 1] = size, -size
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 1, 1]]))
    expected = 2 * float(torch.tensor(size, dtype=dtype))  # overflows float32 for 3e38
    assert metric.mean_nll == pytest.approx(expected, rel=1e-6)
    assert metric.compute() == math.inf


def test_f22_perplexity_just_below_overflow_is_finite():
    logits = torch.tensor([[[0.0, 709.0], [0.0, 0.0]]])
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 0]]))
    assert float(metric.compute()) == pytest.approx(math.exp(709.0), rel=1e-4)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.bfloat16]
)
def test_f22_states_stay_float64_when_the_module_around_is_cast(batch, cast):
    logits, ids, mask, _ = batch
    parent = nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": Perplexity()})
    parent["metric"].update(logits, ids, attention_mask=mask)
    before = parent["metric"].nll_sum.clone()
    cast(parent)
    metric = parent["metric"]
    assert parent["linear"].weight.dtype in (torch.bfloat16, torch.float16)
    assert metric.nll_sum.dtype == torch.float64
    assert metric.nll_sum == before
    metric.set_dtype(torch.float16).reset()
    assert (metric.nll_sum.dtype, metric.num_scored.dtype) == (torch.float64, torch.int64)


def test_f22_counts_go_on_beyond_two_to_the_24(batch):
    logits, ids, _, _ = batch
    metric = Perplexity()
    metric.update(logits, ids)
    tokens, mean = metric.num_tokens, metric.mean_nll
    metric.num_scored = metric.num_scored + 2**24
    metric.nll_sum = metric.nll_sum + mean * 2**24
    for _ in range(3):
        metric.update(logits, ids)
    assert metric.num_tokens == 2**24 + 4 * tokens
    assert metric.mean_nll == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_are_refused_by_count_and_batch(batch, value):
    logits, ids, mask, _ = batch
    metric = Perplexity()
    metric.update(logits, ids, attention_mask=mask)
    before = metric.result()
    broken = logits.clone()
    broken[3, 2:4] = value
    with pytest.raises(CalibrationError, match=r"2 of 18 scored tokens in batch 1 "):
        metric.update(broken, ids, attention_mask=mask)
    assert metric.result() == before


def test_non_finite_logits_of_padding_do_not_matter(batch):
    logits, ids, mask, _ = batch
    clean, dirty = Perplexity(), Perplexity()
    clean.update(logits, ids, attention_mask=mask)
    dirty.update(logits.masked_fill(mask[..., None] == 0, math.nan), ids, attention_mask=mask)
    assert dirty.result() == clean.result()


def test_minus_infinity_is_a_probability_of_zero_elsewhere_and_refused_at_the_token():
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 1]]))
    assert float(metric.compute()) == pytest.approx(2.0)
    with pytest.raises(CalibrationError, match="1 of 1 scored tokens in batch 1"):
        metric.update(logits, torch.tensor([[0, 2]]))


def test_nothing_to_score_is_an_error_with_counts():
    metric = Perplexity()
    metric.update(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), label_mask=torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="no token to score in 2 rows of 6 real tokens"):
        metric.compute()


def test_empty_batch_adds_nothing(batch):
    logits, ids, _, _ = batch
    metric = Perplexity()
    metric.update(logits, ids)
    before = metric.result()
    metric.update(logits[:0], ids[:0])
    metric.update(logits[:, :1], ids[:, :1])
    assert metric.result().num_tokens == before.num_tokens


def test_wrong_shapes_and_labels_are_refused(batch):
    logits, ids, mask, labels = batch
    metric = Perplexity()
    for arguments, message in (
        (((logits[:, 1:], ids), {}), "logits are"),
        (((logits, ids), {"attention_mask": mask[None]}), r"attention_mask is \[1, 4, 9\]"),
        (((logits, ids), {"labels": labels, "label_mask": mask}), "both label_mask and labels"),
        (((logits, ids), {"labels": labels.roll(-1, 1)}), "not shifted"),
    ):
        with pytest.raises(ConfigError, match=message):
            metric.update(*arguments[0], **arguments[1])
    with pytest.raises(CalibrationError, match="1 of 32 scored tokens in batch 4 are outside"):
        metric.update(logits, ids.index_put((torch.tensor(0), torch.tensor(4)), torch.tensor(50)))


def test_merged_ranks_equal_one_process(batch):
    logits, ids, mask, labels = batch
    whole, first, second = Perplexity(), Perplexity(), Perplexity()
    whole.update(logits, ids, attention_mask=mask, labels=labels)
    first.update(logits[:1], ids[:1], attention_mask=mask[:1], labels=labels[:1])
    second.update(logits[1:], ids[1:], attention_mask=mask[1:], labels=labels[1:])
    first.merge_state(second)
    merged, expected = first.result(), whole.result()
    assert merged.num_tokens == expected.num_tokens
    assert merged.context_length == expected.context_length
    assert merged.mean_nll == pytest.approx(expected.mean_nll, rel=1e-15)


def _one_rank(rank, folder, batch):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    logits, ids, mask, labels = batch
    metric = Perplexity()
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares
    metric.update(logits[mine], ids[mine], attention_mask=mask[mine], labels=labels[mine])
    (folder / f"{rank}.json").write_text(json.dumps(asdict(metric.result())))
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_equal_one(batch, tmp_path):
    logits, ids, mask, labels = batch
    whole = Perplexity()
    whole.update(logits, ids, attention_mask=mask, labels=labels)
    # fork: a fresh interpreter spends ten seconds on imports, and these children run one thread
    torch.multiprocessing.start_processes(
        _one_rank, args=(tmp_path, batch), nprocs=2, start_method="fork"
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    expected = asdict(whole.result())
    assert ranks[0] == pytest.approx(expected, rel=1e-15)


def test_update_in_inference_mode_and_outside(batch):
    logits, ids, _, _ = batch
    metric = Perplexity()
    with torch.inference_mode():
        metric.reset()
        metric.update(logits, ids)
    metric.update(logits.requires_grad_(), ids)
    assert metric.num_tokens == 64
    assert not metric.nll_sum.requires_grad


def test_pickle_clone_and_empty_state_dict(batch):
    logits, ids, _, _ = batch
    metric = Perplexity()
    metric.update(logits, ids)
    expected = metric.result()
    assert metric.clone().result() == pickle.loads(pickle.dumps(metric)).result() == expected
    assert metric.state_dict() == {}
    metric.reset()
    metric.update(logits[:1], ids[:1])
    assert metric.result().num_rows == 1


def test_perplexity_of_equals_the_models_own_loss_and_leaves_it_alone():
    model = tiny_model().train()
    batch = padded_batch(tiny_rows(4, uneven=True))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss.item()
    result = perplexity_of(model, [batch])
    assert result.mean_nll == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_perplexity_of_does_not_depend_on_padding_or_order():
    model, rows = tiny_model(), tiny_rows(6, uneven=True)
    one = perplexity_of(model, [padded_batch(rows)])
    other = perplexity_of(model, [padded_batch([r], side="left", extra=3) for r in rows[::-1]])
    assert one.num_tokens == other.num_tokens == sum(len(r) - 1 for r in rows)
    assert one.context_length == other.context_length
    assert one.mean_nll == pytest.approx(
        other.mean_nll, rel=1e-5
    )  # float32 attention, other shapes


def test_perplexity_of_reads_objects_and_refuses_what_it_cannot():
    class Batch:
        input_ids = torch.tensor([[3, 4, 5, 6]])
        attention_mask = None
        label_mask = torch.tensor([[False, False, True, True]])

    model = tiny_model()
    assert perplexity_of(model, [Batch()]).num_tokens == 2
    with pytest.raises(CalibrationError, match="no batch"):
        perplexity_of(model, [])
    with pytest.raises(ConfigError, match="without input_ids"):
        perplexity_of(model, [{"ids": Batch.input_ids}])
    with pytest.raises(ConfigError, match="is a list"):
        perplexity_of(model, [{"input_ids": Batch.input_ids, "label_mask": [True]}])
    model.lm_head.weight.data[0, 0] = math.nan
    masked = {"input_ids": Batch.input_ids, "label_mask": torch.zeros(1, 4)}
    with pytest.raises(CalibrationError, match="in batch 1 have no finite"):
        perplexity_of(model, [masked, Batch()])
