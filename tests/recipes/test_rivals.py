"""The rivals that are only compared: each against its formula, computed naively."""

import sys
from pathlib import Path

import pytest
import torch

from lit_prune.calibration import Row, RowSet
from lit_prune.errors import BudgetError
from lit_prune.metrics import footprint_of, measure_latency
from tests.models import tiny_model, tiny_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from rivals import RIVALS, slicegpt, sparsegpt_2_4, wanda_2_4
from rivals.masks import lowest_two_of_four
from rivals.stream import Stream, seen


@pytest.fixture
def rows():
    return RowSet.of(Row.of(row) for row in tiny_rows(16, 20, uneven=True))


def logits(model):
    ids = torch.stack(tiny_rows(3, 24, seed=5))
    with torch.no_grad():
        return model(input_ids=ids).logits


def unchanged(model, call):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [False, True])
def test_slicegpt_with_nothing_cut_is_the_dense_model(rows, family, tie):
    model = tiny_model(family, tie=tie)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    whole = unchanged(model, lambda: slicegpt.sliced(model, rows, model.config.hidden_size))
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-4, rtol=1e-4)


def naively_sliced_logits(model, rows, width, ids):
    """The same cuts as projections of a full-width stream: no adapters, nothing turned."""
    decoder = model.model

    def run(ids, mask, projections):
        """Return the streams before each projection; one more projection than given is missing."""
        x, streams = decoder.embed_tokens(ids).double(), []
        positions = torch.arange(ids.shape[1])[None]
        turn = decoder.rotary_emb(x.float(), positions)
        causal = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        points = iter(projections)

        def cut(x):
            streams.append(x)
            projection = next(points, None)
            return x if projection is None else x @ projection

        def done():
            return len(streams) > len(projections)

        x = cut(x)
        for layer in decoder.layers:
            if done():
                return streams
            normed = layer.input_layernorm(x.float())
            added = layer.self_attn(normed, attention_mask=causal, position_embeddings=turn)[0]
            x = cut(x + added.double())
            if done():
                return streams
            x = cut(x + layer.mlp(layer.post_attention_layernorm(x.float())).double())
        streams.append(x)
        return streams

    projections = []
    for _ in range(2 * len(decoder.layers)):  # the last output is not cut
        moment = 0
        for row in seen(rows).rows:
            stream = run(row.ids[None], None, projections)[-1]
            moment = moment + stream[0].T @ stream[0]
        components = torch.linalg.eigh(moment)[1].flip(1)[:, :width]
        projections.append(components @ components.T)
    return model.lm_head(decoder.norm(run(ids, None, projections)[-1].float()))


@torch.no_grad()
def test_slicegpt_is_a_projection_of_the_stream_at_every_addition(rows):
    model = tiny_model(layers=2)
    ids = torch.stack(tiny_rows(3, 24, seed=5))
    wanted = naively_sliced_logits(model, rows, 24, ids)
    torch.testing.assert_close(
        logits(slicegpt.sliced(model, rows, 24)), wanted, atol=1e-3, rtol=1e-3
    )


def test_slicegpt_counts_its_adapters(rows):
    # wide enough that one component is less than the tolerance
    model = tiny_model(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=16)
    found, facts = slicegpt.pruned(model, rows, 0.3)
    before = footprint_of(model)
    size = footprint_of(found, peak_ids=torch.ones(1, 8, dtype=torch.int64))
    assert facts["achieved"] == pytest.approx(0.3, abs=0.005)
    assert size.decoder_parameters == round(before.decoder_parameters * (1 - facts["achieved"]))
    assert size.flops_per_token < before.flops_per_token
    assert size.kv_cache_bytes_per_token == before.kv_cache_bytes_per_token
    prompt = torch.stack(tiny_rows(1, 8))
    assert measure_latency(found, prompt, new_tokens=2, repetitions=3).prefill_seconds > 0


def test_slicegpt_counts_biases(rows):
    for options in ({"attention_bias": True, "mlp_bias": True}, {}):
        model = tiny_model("llama", **options)
        for width in (20, 32):
            found = slicegpt.sliced(model, rows, width)
            left = sum(p.numel() for p in found.model.layers.parameters())
            dense = sum(p.numel() for p in model.model.layers.parameters())
            assert slicegpt._removed(model, width) == pytest.approx(1 - left / dense)


def test_slicegpt_refuses_a_ratio_that_no_width_reaches(rows):
    with pytest.raises(BudgetError, match="nearest width"):
        slicegpt.pruned(tiny_model(), rows, 0.999)


@pytest.mark.parametrize("name", ["sparsegpt_2_4", "wanda_2_4"])
def test_exactly_two_of_every_four_weights_are_zero(rows, name):
    model = tiny_model()
    found, facts = unchanged(model, lambda: RIVALS[name](model, rows, 0.5))
    for module in found.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            fours = module.weight.reshape(len(module.weight), -1, 4)
            assert ((fours == 0).sum(-1) == 2).all()
    assert facts["achieved"] == 0
    assert facts["notes"].startswith("50% of the linear weights are zero")
    assert torch.isfinite(logits(found)).all()


def test_wanda_zeroes_the_lowest_weight_times_norm(rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 12, generator=generator)
    inputs = torch.randn(50, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13)
    found = wanda_2_4.masked_weight(weight, inputs.T @ inputs)
    for row in range(6):
        for start in range(0, 12, 4):
            scores = [
                abs(float(weight[row, j])) * float(inputs[:, j].norm())
                for j in range(start, start + 4)
            ]
            lowest = sorted(range(4), key=scores.__getitem__)[:2]
            for j in range(4):
                kept = 0.0 if j in lowest else float(weight[row, start + j])
                assert float(found[row, start + j]) == kept


def test_sparsegpt_is_the_obs_solution(rows):
    """Column after column with explicit inverses of what is left of the Hessian."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 8, generator=generator, dtype=torch.float64) @ mix
    moment = inputs.T @ inputs
    hessian = moment + 0.01 * moment.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    wanted = weight.clone()
    for row in wanted:
        gone = []
        for column in range(8):
            if column % 4 == 0:
                saliency = [
                    row[j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0]
                    for j in range(column, column + 4)
                ]
                gone = [column + j for j in sorted(range(4), key=saliency.__getitem__)[:2]]
            if column in gone:
                inverse = torch.linalg.inv(hessian[column:, column:])
                row[column:] -= row[column] / inverse[0, 0] * inverse[0]
                row[column] = 0
    torch.testing.assert_close(sparsegpt_2_4.masked_weight(weight, moment), wanted)
    # what is left answers for the loss: the error on the inputs is below that of zeros alone
    alone = torch.where(wanted == 0, 0.0, weight)
    assert ((wanted - weight) @ inputs.T).norm() < ((alone - weight) @ inputs.T).norm()


def test_sparsegpt_with_an_input_that_is_always_zero():
    weight, moment = torch.ones(2, 4), torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]).double())
    found = sparsegpt_2_4.masked_weight(weight, moment)
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2


def test_rows_of_no_fours_are_refused():
    with pytest.raises(ValueError, match="multiple of four weights, got 6"):
        lowest_two_of_four(torch.ones(2, 6))


@torch.no_grad()
def test_the_stream_is_the_forward_of_real_tokens(rows):
    model = tiny_model()
    stream = Stream(model, rows)
    for layer in model.model.layers:
        stream.through(layer)
    wanted, tokens = 0, 0
    for row in seen(rows).rows:
        hidden = model.model(input_ids=row.ids[None], output_hidden_states=True)
        out = hidden.last_hidden_state[0].double()
        wanted, tokens = wanted + out.T @ out, tokens + len(out)
    states = [model.model.norm(states) for states in stream.states]
    torch.testing.assert_close(stream.second_moment(states), wanted, atol=1e-3, rtol=1e-4)
    assert sum(int(real.sum()) for real in stream.real) == tokens
