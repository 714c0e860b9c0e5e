"""What lies inside a sub-block, fitted: against raw activations and a system written out."""

from dataclasses import replace

import pytest
import torch

from lit_prune import inner
from lit_prune.calibration import inputs_of, two_streams
from lit_prune.decoder import DecoderParts, quiet, spec_for
from lit_prune.inner import _product, can_be_fitted_inside, fit_inner
from lit_prune.plan import LayerPlan, PruningPlan
from lit_prune.sequential import sequential_compensation
from lit_prune.slopes import Told, Writes
from lit_prune.surgery import Compensation, apply_plan, fitted_inputs, masked, unit_columns
from tests.models import CONFIGS, tiny_model
from tests.naive import uneven_rows
from tests.state import unchanged

ROWS = uneven_rows(40)
KEPT = {"attention": (1,), "mlp": tuple(range(3, 27))}
KINDS = ("attention", "mlp")
ALL = (0, 1), tuple(range(48))


class Place:
    """One cut sub-block of a single layer, with an output projection that is not the dense one."""

    def __init__(self, kind, family="llama", **options):
        # in float64, so that many steps lead to the end
        self.model = tiny_model(family, layers=1, **options).double()
        self.parts, self.place, self.kept = DecoderParts(self.model), (0, kind), KEPT[kind]
        whole = spec_for(self.model).blocks[0]
        groups, channels = (tuple(range(x.num_units)) for x in (whole.attention, whole.mlp))
        units = (KEPT[kind], channels) if kind == "attention" else (groups, KEPT[kind])
        self.plan = PruningPlan(spec_for(self.model).fingerprint, (LayerPlan(0, *units),))
        dense = self.parts.output(*self.place).weight.detach()
        self.columns = unit_columns(self.kept, self.parts.unit_width(*self.place))
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(dense[:, self.columns].shape, generator=generator)
        weight = (dense[:, self.columns] + 0.3 * dense.std() * noise).float()
        constant = 0.1 * torch.randn(len(dense), generator=generator).double()
        self.made = Compensation({self.place: constant}, self.plan.digest, "", {self.place: weight})
        self.dense = dense
        self.look_at("calibrate")
        self.start = torch.cat(
            [
                each.matrix.detach()[each.rows[list(self.kept)].flatten()]
                for each in fitted_inputs(self.parts, self.place)
            ]
        )

    def look_at(self, side):
        """Measure errors on one side of the text."""
        self.side = side
        self.target = self.entered() @ self.dense.T  # the streams in front of it are equal

    @torch.no_grad()
    def entered(self):
        """What the output projection gets, ``[tokens, width]``."""
        found = []
        handle = self.parts.output(*self.place).module.register_forward_pre_hook(
            lambda _module, args: found.append(args[0].flatten(0, -2))
        )
        for row in ROWS.side(self.side):
            self.model(input_ids=row.ids[None], use_cache=False)
        handle.remove()
        return torch.cat(found)

    def fit(self):
        return self.there(
            lambda text: fit_inner(self.parts, self.place, self.kept, self.made, text)
        )

    def there(self, do):
        """What a function makes of the text, where that has arrived at the sub-block."""
        sides = ("calibrate", "choose")
        with quiet(self.model), two_streams(self.parts, ROWS, sides, 4096) as text:
            for batch in (*text["calibrate"], *text["choose"]):
                batch.lead(self.parts, 0)
                batch.arrive(self.parts, self.place)
            with masked(self.model, self.plan, self.made):
                return do(text)

    def lacks(self, weight):
        """What the target lacks, ``[tokens, hidden]``, from a forward with these weights."""
        with masked(self.model, self.plan, replace(self.made, inner={self.place: weight})):
            x = self.entered()[:, self.columns]
        written = x @ self.made.weights[self.place].double().T + self.made.constants[self.place]
        return self.target - written

    def error(self, weight):
        return float(self.lacks(weight).square().sum(1).mean())


@pytest.fixture
def to_the_end(monkeypatch):
    """As many steps as it takes, on the text that is fitted."""
    monkeypatch.setattr(inner, "_SIDES", ("calibrate", "calibrate"))
    monkeypatch.setattr(inner, "_STEPS", dict.fromkeys(KINDS, 2000))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma", "gpt2", "gpt_neox"])
def test_the_matrix_of_an_mlp_is_that_of_gauss_and_newton(family):
    """Slopes forwards, then backwards, of the module itself with its weights as arguments."""
    place = Place("mlp", family)
    parts, mlp = place.parts, place.parts.sub_block(0, "mlp")
    inputs, output = fitted_inputs(parts, place.place), parts.output(*place.place)
    with inputs_of(inputs[0].module) as read:
        place.entered()
    z = torch.cat([x.flatten(0, -2) for x in read]).detach()
    with torch.no_grad():
        output.matrix.zero_()
        output.matrix[:, place.columns] = place.made.weights[place.place].double()
    stored = {id(x): name for name, x in mlp.named_parameters()}

    def writes(weight):
        sizes = [len(place.kept) * each.rows.shape[1] for each in inputs]
        changed = {}
        for each, part in zip(inputs, weight.split(sizes), strict=True):
            matrix = each.matrix.detach().index_copy(0, each.rows[list(place.kept)].flatten(), part)
            changed[stored[id(each.module.weight)]] = matrix.T if each.transposed else matrix
        return torch.func.functional_call(mlp, changed, (z,))

    way = torch.randn(place.start.shape, generator=torch.Generator().manual_seed(0)).double()
    _, moved = torch.autograd.functional.jvp(writes, place.start, way)
    _, expected = torch.autograd.functional.vjp(writes, place.start, moved)

    def product(text):
        what = Writes(parts, place.place, place.kept, place.made)
        return _product(what, [Told(batch, what) for batch in text["calibrate"]], way)

    torch.testing.assert_close(place.there(product), expected / len(z), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"attention_bias": True}), ("qwen2", {}), ("phi3", {})],
)
def test_no_direction_leads_further_down(to_the_end, family, options):
    """Biases, query heads that share a value, fused projections: none of them is in the way."""
    place = Place("attention", family, kv_heads=2, **options)
    found = place.fit()
    best = place.error(found.weight)
    assert best < 0.98 * place.error(place.start)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        way = torch.randn(found.weight.shape, generator=generator) * found.weight.std()
        for far in (-0.02, 0.02):
            assert place.error(found.weight + far * way) > best


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_help_on_text_that_was_not_fitted(kind):
    place = Place(kind, kv_heads=2)
    with unchanged(place.model):
        found = place.fit()
    assert 1 <= found.steps <= inner._STEPS[kind]
    assert found.weight.dtype == torch.float32
    assert place.error(found.weight) < place.error(place.start)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_slopes_of_an_mlp_are_made_once_a_round_and_not_kept_longer(family, monkeypatch):
    place, calls = Place("mlp", family), []
    place.parts.sub_block(0, "mlp").register_forward_pre_hook(lambda *_: calls.append(1))

    def fit(text):
        calls.clear()
        found = fit_inner(place.parts, place.place, place.kept, place.made, text)
        assert not {"own", "inputs"} & {name for batch in text["calibrate"] for name in batch.shelf}
        return found, len(calls)

    found, kept_calls = place.there(fit)
    monkeypatch.setattr(Told, "keep", lambda *_: None)
    wanted, calls_without = place.there(fit)
    assert torch.equal(found.weight, wanted.weight)
    assert calls_without - kept_calls >= found.steps > 1


def test_a_target_that_is_met_leaves_everything_as_it_is():
    place = Place("mlp")
    place.target = None
    whole = PruningPlan.keep_all(spec_for(place.model))
    place.plan, place.kept = whole, ALL[1]
    place.made = Compensation({}, whole.digest, "")
    assert place.fit() is None


@pytest.mark.parametrize(
    "family",
    [*CONFIGS, "cohere", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "starcoder2", "mixtral"],
)
def test_which_sub_blocks_are_fitted_and_which_are_linear(family):
    """Tried on the module itself: whether the mean of two weights makes the mean of two outputs."""
    model = tiny_model(family, layers=1)
    parts = DecoderParts(model)
    for kind in KINDS:
        alone = parts.routed(0, kind) is None and parts.is_inside(0, kind)
        assert can_be_fitted_inside(parts, (0, kind)) == alone
    projection = parts.inputs(0, "attention")[-1]
    lines, stored = projection.rows.flatten(), projection.module.weight
    start, before = projection.weight.detach().clone(), stored.detach().clone()
    hidden = torch.randn(1, 7, parts.hidden_size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def writes(weight):
        projection.matrix[lines] = weight
        with inputs_of(parts.output(0, "attention").module) as entered:
            model.base_model(inputs_embeds=hidden, use_cache=False)
        stored.copy_(before)
        return entered[0].double()

    away = torch.randn(start.shape, generator=torch.Generator().manual_seed(2)) * start.std()
    mean = (writes(start + 3 * away) + writes(start - 3 * away)) / 2
    torch.testing.assert_close(mean, writes(start), rtol=1e-4, atol=1e-5)


def leaves(model):
    """The stream behind the first layer, ``[tokens, hidden]``."""
    parts = DecoderParts(model)
    with inputs_of(parts.layers[1]) as found, torch.no_grad():
        for row in ROWS.side("calibrate"):
            model(input_ids=row.ids[None], use_cache=False)
    return torch.cat([x.flatten(0, -2) for x in found]).double()


@pytest.mark.parametrize(
    "family", [*CONFIGS, "cohere", "gemma2", "gpt2", "gpt_neox", "olmo2", "opt"]
)
def test_the_whole_fit_is_better_with_it_and_surgery_does_it(family, monkeypatch):
    model = tiny_model(family, layers=3, kv_heads=2)
    every = tuple(range(spec_for(model).blocks[0].mlp.num_units))
    some = every[: len(every) // 2]
    layers = (LayerPlan(0, (0, 1), some), LayerPlan(1, (), some), LayerPlan(2, (1,), every))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    if "kv_group" in dict(spec_for(model).refused):
        pytest.skip("its KV groups cannot go")
    found = sequential_compensation(model, plan, ROWS)
    monkeypatch.setattr("lit_prune.sequential.can_be_fitted_inside", lambda *_: False)
    without = sequential_compensation(model, plan, ROWS)
    assert found.inner
    assert not without.inner
    # of random layers what a later one makes of a smaller error may be a larger one
    dense = leaves(model)
    far = []
    for compensation in (found, without):
        with masked(model, plan, compensation):
            far.append(float((leaves(model) - dense).square().sum()))
    assert far[0] < far[1]
    apply_plan(model, plan, found)  # compares with the masked model


@torch.inference_mode()
def made_under_inference_mode():
    return tiny_model(layers=2)


@pytest.mark.parametrize("born", [False, True])
def test_under_inference_mode_and_with_parameters_that_train(born):
    model = made_under_inference_mode() if born else tiny_model(layers=2)
    if not born:
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = (LayerPlan(0, (0,), KEPT["mlp"]), LayerPlan(1, *ALL))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    plain = sequential_compensation(model, plan, ROWS)
    with torch.inference_mode():
        found = sequential_compensation(model, plan, ROWS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    assert plain.inner.keys() == found.inner.keys() != set()
    for place, weight in plain.inner.items():
        assert torch.equal(weight, found.inner[place])
        assert not found.inner[place].is_inference()


def test_it_is_saved_with_the_rest(tmp_path):
    model = tiny_model(layers=2)
    layers = (LayerPlan(0, (0,), KEPT["mlp"]), LayerPlan(1, *ALL))
    found = sequential_compensation(model, PruningPlan(spec_for(model).fingerprint, layers), ROWS)
    found.save(tmp_path / "compensation.safetensors")
    again = Compensation.load(tmp_path / "compensation.safetensors")
    assert again.inner.keys() == found.inner.keys() != set()
    assert all(torch.equal(again.inner[place], x) for place, x in found.inner.items())


class Louder(torch.nn.Linear):
    """Computes something else than its weight says."""

    def forward(self, x):
        return 1.1 * super().forward(x)


def louder(projection):
    other = Louder(projection.in_features, projection.out_features, bias=False)
    other.weight = projection.weight
    return other


def test_a_projection_that_does_more_than_its_weight_says_is_left_alone():
    model = tiny_model(layers=2, kv_heads=2)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, mlp.up_proj = louder(attention.q_proj), louder(mlp.up_proj)
    every = tuple(range(spec_for(model).blocks[0].mlp.num_units))
    layers = (LayerPlan(0, (0,), every[:24]), LayerPlan(1, (1,), every))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    found = sequential_compensation(model, plan, ROWS)
    assert (1, "mlp") not in found.inner
    apply_plan(model, plan, found)  # compares with the masked model


def test_hooks_of_the_caller_see_no_slopes_and_are_not_run_twice():
    model = tiny_model(layers=2)
    layers = (LayerPlan(0, (0, 1), KEPT["mlp"]), LayerPlan(1, *ALL))
    plan = PruningPlan(spec_for(model).fingerprint, layers)
    plain = sequential_compensation(model, plan, ROWS)
    assert (0, "mlp") in plain.inner
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _module, _args, output: seen.append(output.requires_grad)
    )
    watched = sequential_compensation(model, plan, ROWS)
    assert (0, "mlp") not in watched.inner
    assert seen
    assert not any(seen)
    twice = tiny_model(layers=2)
    twice.model.layers[0].mlp.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    parts = DecoderParts(twice)
    with quiet(twice), two_streams(parts, ROWS, ["calibrate"], 4096) as text:
        for batch in text["calibrate"]:
            batch.lead(parts, 0)
            batch.arrive(parts, (0, "mlp"))
            pruned, dense = batch.reads(parts, (0, "mlp"))
            assert torch.equal(pruned, dense)


def test_values_that_are_clipped_are_no_worse_on_text_that_was_not_fitted():
    """Not linear: the steps are those of where it stands, and every one is tried."""
    place = Place("attention", "olmo", kv_heads=2, clip_qkv=1.0)
    found = place.fit()
    place.look_at("choose")
    assert found is None or place.error(found.weight) < place.error(place.start)


def test_a_value_that_is_all_bias_does_not_stop_the_rest():
    place = Place("attention", "qwen2", kv_heads=2)
    value = place.parts.inputs(0, "attention")[-1]
    with torch.no_grad():
        value.module.weight[value.rows[place.kept[0], 0]] = 0
        value.module.bias[value.rows[place.kept[0], 0]] = 1
    place.start[0] = 0
    found = place.fit()
    assert place.error(found.weight) < 0.99 * place.error(place.start)


class Unsloped(torch.nn.Module):
    """An activation of an inference kernel."""

    def forward(self, x):
        with torch.no_grad():
            return torch.nn.functional.silu(x)


class InPlace(torch.autograd.Function):
    """A gate whose backward writes over what it saved, as fused kernels do."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, slope):
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        of_up = slope * gate * share
        of_gate = slope * up * share * (1 + gate * (1 - share))
        gate.data.copy_(of_gate)
        up.data.copy_(of_up)
        return gate, up


class Fused(torch.nn.Module):
    """An MLP on top of `InPlace`."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(InPlace.apply(self.gate_proj(x), self.up_proj(x)))


def half_cut(model):
    layers = (LayerPlan(0, ALL[0], KEPT["mlp"]), LayerPlan(1, *ALL))
    return PruningPlan(spec_for(model).fingerprint, layers)


@pytest.mark.parametrize(("family", "name"), [("llama", "act_fn"), ("starcoder2", "act")])
def test_what_has_no_slope_is_left_alone(family, name):
    """Of a gate without a slope the up projection has one."""
    model = tiny_model(family, layers=2)
    for layer in model.model.layers:
        setattr(layer.mlp, name, Unsloped())
    plan, gates = half_cut(model), model.model.layers[0].mlp
    found = sequential_compensation(model, plan, ROWS)
    assert ((0, "mlp") in found.inner) == (family == "llama")
    if family == "llama":
        gate = found.inner[0, "mlp"][: len(KEPT["mlp"])]
        assert torch.equal(gate, gates.gate_proj.weight[list(KEPT["mlp"])])
    apply_plan(model, plan, found)


def test_kernels_that_write_over_what_they_saved_say_the_same():
    model = tiny_model(layers=2)
    plan = half_cut(model)
    plain = sequential_compensation(model, plan, ROWS)
    for layer in model.model.layers:
        layer.mlp = Fused(layer.mlp)
    fused = sequential_compensation(model, plan, ROWS)
    assert plain.inner.keys() == fused.inner.keys() != set()
    for place, weight in plain.inner.items():
        torch.testing.assert_close(fused.inner[place], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Slopes, and sums over tokens, are beyond 65,504, the largest number of float16."""
    model = tiny_model(layers=1, kv_heads=2)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(10)
        for projection in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            projection.weight.mul_(5)
    plan = PruningPlan(spec_for(model).fingerprint, (LayerPlan(0, (0, 1), KEPT["mlp"]),))
    rows = uneven_rows(100)
    steps = [
        sequential_compensation(each, plan, rows).facts["layer 0 mlp"].get("inner_steps", 0)
        for each in (model, model.to(dtype))
    ]
    assert steps[0] > 3
    assert steps[1] > steps[0] / 2


@pytest.mark.parametrize(
    "hook", ["register_forward_pre_hook", "register_full_backward_hook", "register_forward_hook"]
)
def test_hooks_inside_are_not_handed_slopes(hook):
    model = tiny_model(layers=2)
    calls = []
    getattr(model.model.layers[0].mlp.act_fn, hook)(lambda *_: calls.append(1))
    assert not can_be_fitted_inside(DecoderParts(model), (0, "mlp"))
    assert can_be_fitted_inside(DecoderParts(model), (1, "mlp"))
    assert not calls
