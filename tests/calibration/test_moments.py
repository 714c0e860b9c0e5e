import copy

import pytest
import torch

from lit_prune.calibration import ChannelMoments, moments
from lit_prune.calibration.covariance import ChannelCovariance
from lit_prune.calibration.moments import block_moments
from lit_prune.errors import CalibrationError

# What the module promises: float32 within a block, float64 between them.
RELATIVE = 1e-5


def exactly(x):
    x = x.double()
    return x.mean(0), x.var(0, correction=0)


def normal(tokens, channels, *, mean=0.0, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator) * std + mean


def check(found, x, relative=RELATIVE):
    mean, variance = exactly(x)
    assert found[0].dtype == found[1].dtype == torch.float64
    # a mean is exact relative to the deviation about it: it may be near 0 itself
    assert ((found[0] - mean).abs() <= relative * variance.sqrt()).all()
    torch.testing.assert_close(found[1], variance, rtol=relative, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (100.0, 1.0), (-3.0, 0.03), (0.0, 1e-3)])
def test_f22_equal_to_float64_reference_where_the_mean_dwarfs_the_deviation(dtype, mean, std):
    x = normal(20_000, 6, mean=mean, std=std).to(dtype)
    metric = ChannelMoments(6)
    for part in x.split(1234):
        metric.update(part)
    check(metric.compute(), x)


def test_f22_channels_of_very_different_size():
    x = normal(5000, 4) * torch.tensor([1e-6, 1.0, 1e3, 1e6]) + torch.tensor([1e-4, 100, 0, 1e8])
    metric = ChannelMoments(4)
    metric.update(x)
    check(metric.compute(), x)


@pytest.mark.parametrize("seed", range(3))
def test_any_split_in_any_order_merges_to_the_same(seed):
    x = normal(4000, 5, mean=50.0)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, 700, (40,), generator=generator).tolist()
    metric = ChannelMoments(5)
    rest = x[torch.randperm(len(x), generator=generator)]
    for cut in [*cuts, len(x)]:
        metric.update(rest[:cut])  # sometimes empty, sometimes one row
        rest = rest[cut:]
    check(metric.compute(), x)
    assert int(metric.count) == len(x)


def test_blocks_within_a_batch_merge_exactly(monkeypatch):
    x = normal(1000, 8, mean=100.0)
    monkeypatch.setattr(moments, "_BLOCK_ELEMENTS", 64)
    count, mean, m2 = block_moments(x)
    check((mean, m2 / count), x)


def test_ranks_are_merged_by_their_counts():
    x = normal(3000, 3, mean=10.0)
    ranks = [ChannelMoments(3), ChannelMoments(3), ChannelMoments(3)]
    ranks[0].update(x[:100])
    ranks[1].update(x[100:])  # the third saw nothing
    whole = ChannelMoments(3)
    for state in ("count", "mean", "m2"):  # what torchmetrics leaves after a gather with None
        setattr(whole, state, torch.stack([getattr(rank, state) for rank in ranks]))
    whole._update_count = 1
    check(whole.compute(), x)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "to"])
def test_f22_casting_the_module_leaves_float64(cast):
    metric = ChannelMoments(2)
    metric.update(normal(10, 2))
    holder = torch.nn.ModuleDict({"metric": metric})
    holder.to(torch.bfloat16) if cast == "to" else getattr(holder, cast)()
    assert metric.mean.dtype == metric.m2.dtype == torch.float64
    assert metric.count.dtype == torch.int64


def test_f22_half_precision_input_does_not_overflow_its_square():
    x = torch.full((4096, 2), 30_000.0, dtype=torch.float16)  # squared: 9e8, above 65504
    x[::2] = -30_000.0
    metric = ChannelMoments(2)
    metric.update(x)
    check(metric.compute(), x)


def test_f19_a_constant_channel_has_variance_zero():
    x = normal(5000, 3, mean=7.0)
    x[:, 1] = 12_345.678
    metric = ChannelMoments(3)
    metric.update(x)
    mean, variance = metric.compute()
    assert variance[1] == 0
    assert mean[1] == pytest.approx(x[0, 1].item(), rel=1e-7)


def test_one_channel_keeps_its_shape():
    metric = ChannelMoments(1)
    metric.update(normal(10, 1))
    mean, variance = metric.result()
    assert mean.shape == variance.shape == (1,)
    covariance = ChannelCovariance(1)
    covariance.update(normal(10, 1))
    assert covariance.result().shape == (1, 1)


def test_f11_no_token_is_an_error_not_nan():
    moments, covariance = ChannelMoments(2, "layer 3"), ChannelCovariance(2)
    for metric in (moments, covariance):
        metric.update(torch.empty(0, 2))
    with pytest.raises(CalibrationError, match="no token reached layer 3"):
        moments.compute()
    with pytest.raises(CalibrationError, match="no token reached the covariance"):
        covariance.result()
    with pytest.raises(CalibrationError, match="no token reached the covariance"):
        ChannelCovariance(2).result()
    covariance.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    covariance.update(torch.empty(0, 2))
    assert covariance.result().tolist() == [[1, 0], [0, 0]]


def test_measuring_adds_nothing():
    metric = ChannelMoments(3)
    metric.update(normal(50, 3))
    before = copy.deepcopy(metric.metric_state)
    metric.measure(normal(50, 3, mean=9.0))
    assert all(torch.equal(before[name], value) for name, value in metric.metric_state.items())


def test_covariance_equals_float64_reference():
    x = normal(3000, 6, mean=100.0) @ normal(6, 6, seed=1)
    metric = ChannelCovariance(6)
    for part in x.split(700):
        metric.update(part)
    wanted = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(metric.result(), wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())
