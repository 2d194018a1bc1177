"""Plateaus are found where they were built, and none where there is none."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.plateaus import (
    BASES,
    DIRECTIONS,
    Perturbations,
    Rerun,
    plateaus,
    response_metrics,
    sae_error_kl,
)

SEEDS = range(5)
D, FEATURES, ACTIVE = 32, 24, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """Reads each feature's strength by a unit that is 0 up to `low` and 1 from `low` + `wide` on."""

    def __init__(self, features, low, wide):
        super().__init__()
        self.register_buffer("features", features)
        self.low, self.wide = low, wide

    def forward(self, x):
        strengths = x @ self.features.T
        return ((strengths - self.low) / self.wide).clamp(0, 1)


class Planted(nn.Module):
    """Tokens are bags of three of 24 orthonormal features of strength 1, which a saturating layer reads."""

    def __init__(self, seed, low=0.4, wide=0.2):
        super().__init__()
        g = generator(seed)
        self.features = torch.linalg.qr(torch.randn(D, D, generator=g))[0][:FEATURES]
        bags = torch.stack([torch.randperm(FEATURES, generator=g)[:ACTIVE] for _ in range(100)])
        self.embed = nn.Embedding.from_pretrained(self.features[bags].sum(1))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity(), Block(self.features, low, wide)])

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def sae(self):
        sae = sk.SAE(D, FEATURES, sk.TopK(ACTIVE))
        with torch.no_grad():
            sae.W_enc.copy_(self.features)
            sae.W_dec.copy_(self.features)
        return sae.eval()


def token_ids(seed, contexts=30, positions=6, words=100):
    return torch.randint(words, (contexts, positions), generator=generator(seed))


class Words(nn.Module):
    """Logits of a linear map of the activations: the model that a divergence has no plateau in."""

    def __init__(self, seed, d=8, words=12, scale=1.0):
        super().__init__()
        g = generator(seed)
        self.embed = nn.Embedding.from_pretrained(torch.randn(100, d, generator=g))
        self.block = nn.Identity()
        self.out = nn.Linear(d, words)
        self.out.weight.data = scale * torch.randn(words, d, generator=g)

    def forward(self, ids):
        return self.out(self.block(self.embed(ids)))


# Curves


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(0.1, 10))
def test_metrics_scale_with_the_curve_and_with_alpha(seed, tall, wide):
    alphas = torch.cat([torch.zeros(1).double(), torch.rand(7, generator=generator(seed)).double().cumsum(0) + 0.01])
    values = torch.rand(5, 8, generator=generator(seed + 1)).double()
    values[:, 0] = 0
    one = response_metrics(alphas, values, level=0.3)
    two = response_metrics(wide * alphas, tall * values, level=0.3 * tall)
    for name, factor in {
        "width": wide,
        "onset": wide,
        "slope": tall / wide,
        "steepness": 1,
        "sensitivity": tall / wide,
        "area": 1,
    }.items():
        torch.testing.assert_close(two[name], factor * one[name])


def test_lines_squares_and_steps():
    alphas = torch.linspace(0, 2, 201).double()
    curves = torch.stack([3 * alphas, alphas**2, ((alphas - 1) / 0.01).clamp(0, 1), 0 * alphas, alphas * torch.nan])
    found = response_metrics(alphas, curves, level=0.5)
    approx = lambda *numbers: pytest.approx(numbers, abs=0.01, nan_ok=True)  # noqa: E731
    assert found["width"].tolist() == approx(0.1, 2 * 0.05**0.5, 1.0005, math.nan, math.nan)
    assert found["onset"].tolist() == approx(1 / 6, 0.5**0.5, 1, 2, math.nan)  # the fourth never gets there
    assert found["slope"].tolist() == approx(3, 3.99, 100, 0, math.nan)
    assert found["steepness"].tolist() == approx(1, 1.995, 200, math.nan, math.nan)
    assert found["area"].tolist() == approx(1 / 2, 1 / 3, 1 / 2, math.nan, math.nan)
    assert found["sensitivity"].tolist() == approx(3, 0.01, 0, 0, math.nan)
    squared = response_metrics(alphas, curves, level=0.5, power=2)["sensitivity"]
    assert float(squared[1]) == pytest.approx(2)  # the second derivative


def test_grids_and_levels_are_checked():
    for alphas, values, options in [
        ([0.0], [0.0], {}),
        ([0.1, 0.2], [0, 1.0], {}),
        ([0, 1.0, 1.0], [0, 1, 1.0], {}),
        ([0, 1.0], [0, 1.0, 2.0], {}),
        ([0, 1.0], [0, 1.0], {"share": 1.0}),
        ([0, 1.0], [0, 1.0], {"level": 0.0}),
    ]:
        with pytest.raises(ValueError, match="must"):
            response_metrics(torch.tensor(alphas), torch.tensor(values), **options)


# Planted plateaus


@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_network_has_no_plateau(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(100, 12), nn.Linear(12, 10), nn.Linear(10, 7))
    found = plateaus(model, "1", [token_ids(seed)], measure="distance", alphas=torch.arange(1, 11) / 4, n=20, seed=seed)
    torch.testing.assert_close(
        found.metrics["width"], torch.full_like(found.metrics["width"], 0.125), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(found.metrics["steepness"], torch.ones_like(found.metrics["width"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.metrics["area"], torch.full_like(found.metrics["width"], 0.5), rtol=1e-4, atol=0)
    assert abs(found.differences["real − random"].value) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_width_of_a_planted_plateau_is_found(seed):
    """Along a latent that is off, the saturating layer answers first at 0.4 and fully at 0.6, in strengths."""
    model = Planted(seed)
    found = plateaus(
        model,
        "blocks.1",
        [token_ids(seed)],
        model.sae(),
        ["isotropic", "inactive_latent", "real_difference", "sae_error"],
        measure="distance",
        alphas=torch.arange(1, 101) / 50,
        n=24,
        seed=seed,
    )
    width = found.length * found.metric("width", "real", "inactive_latent")
    # Exactly 0.4 + 5% of 0.2; straight between points of the grid.
    torch.testing.assert_close(width, torch.full_like(width, 0.41), atol=0.02, rtol=0)
    assert found.metrics["steepness"][0, 1].min() > 5
    assert found.values[0, found.directions.index("sae_error")].isnan().all()  # there is no error
    assert found.results["real_difference − isotropic"].p < 0.01
    assert found.differences["real_difference − isotropic"].high < 0


@pytest.mark.parametrize("seed", SEEDS)
def test_bags_of_the_true_features_have_plateaus_and_gaussians_have_none(seed):
    """Mean widths over five seeds: real 0.73 … 0.83, bags 0.76 … 0.87, structured 0.77 … 0.80, random 0.08 … 0.13."""
    model = Planted(seed)
    ids, sae = [token_ids(seed)], model.sae()
    found = plateaus(model, "blocks.1", ids, sae, ["isotropic"], tuple(BASES), measure="distance", n=24, seed=seed)
    width = {kind: float(found.metric("width", kind).mean()) for kind in BASES}
    assert min(width["real"], width["bag"], width["structured"]) > 4 * width["random"]
    assert found.results["real − random"].p < 0.01
    assert found.differences["real − random"].low > 0.4
    assert abs(found.differences["real − bag"].value) < 0.2
    assert abs(found.differences["real − structured"].value) < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_training_to_denoise_widens_plateaus(seed):
    """Isotropic widths over five seeds: 0.09 … 0.10 before, 0.17 … 0.20 after; a line has 0.1."""
    torch.manual_seed(seed)
    features = torch.linalg.qr(torch.randn(16, 16))[0]

    def draw(n):
        bags = (torch.rand(n, 16) < 0.2).float()
        return bags, bags @ features

    model = nn.Sequential(nn.Identity(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    batch = draw(120)[1].view(20, 6, 16)
    options = {"measure": "distance", "directions": ["isotropic", "real_difference"], "bases": ["real"], "n": 20}
    before = plateaus(model, "0", [batch], **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        bags, x = draw(256)
        loss = (model(x + 0.3 * torch.randn_like(x)) - bags).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = plateaus(model, "0", [batch], **options)
    widths = [float(found.metric("width", "real", "isotropic").mean()) for found in (before, after)]
    assert widths[1] > 1.4 * widths[0]
    assert after.differences["real_difference − isotropic"].high < 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_divergence_of_a_linear_readout_has_its_fisher_information_as_sensitivity(seed):
    model = Words(seed)
    found = plateaus(model, "block", [token_ids(seed)], alphas=[0.02, 1.0], n=10, seed=seed)
    tokens = Rerun(model, "block", [token_ids(seed)]).tokens()
    g = generator(seed)
    chosen = tokens.choose(10, g)
    made = Perturbations(tokens.x)
    base = made.base("real", chosen, g)
    assert torch.equal(tokens.sites[chosen], found.sites)
    for row, kind in enumerate(found.directions):
        moves = made.direction(kind, base, chosen, g) @ model.out.weight.T * made.length
        p = model.out(base).softmax(-1)
        fisher = (p * moves.square()).sum(1) - (p * moves).sum(1).square()
        torch.testing.assert_close(found.metrics["sensitivity"][0, row], fisher.detach().double(), rtol=0.1, atol=2e-3)


# Errors of SAEs


class Subspace(nn.Module):
    """Activations of 4 of 32 dimensions, and logits that depend on these alone."""

    def __init__(self, seed):
        super().__init__()
        g = generator(seed)
        self.turn = torch.linalg.qr(torch.randn(32, 32, generator=g))[0][:4]
        self.embed = nn.Embedding.from_pretrained(torch.randn(200, 4, generator=g) @ self.turn)
        self.block = nn.Identity()
        self.weight = torch.randn(20, 4, generator=g) @ self.turn

    def forward(self, ids):
        return self.block(self.embed(ids)) @ self.weight.T


def model_kl(model, sae, ids, sites):
    """KL of putting x̂ in the place of x, by the definition."""
    x = model.embed(ids)[sites[:, 1], sites[:, 2]]
    p, q = ((rows @ model.weight.T).double().log_softmax(-1) for rows in (x, sae(x)))
    return (p.exp() * (p - q)).sum(-1).detach()


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_look_pathological_beside_isotropic_perturbations_only(seed):
    """Ratios over five seeds: isotropic 5.2 … 10.9 (32 / 4 if errors were like activations), mixture 0.73 … 1.27."""
    model = Subspace(seed)
    ids = token_ids(seed, words=200)
    sae = sk.SAE(32, 16, sk.TopK(2))
    with torch.no_grad():
        rows = normalize(torch.randn(16, 4, generator=generator(seed)), dim=1) @ model.turn
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.fit_start_(model.embed.weight)
    found = sae_error_kl(model, "block", sae, [ids], n=40, seed=seed)
    isotropic, mixture = (found.ratio(null) for null in ("isotropic", "cov_mixture"))
    assert isotropic[1] > 2.5  # the lower end
    assert 0.5 < mixture[0] < 1.8
    p_values = found.results["kl"].p_values()
    assert p_values["isotropic"] == 0.05  # the least that 19 samples can give
    assert p_values["cov_mixture"] > 0.05
    torch.testing.assert_close(found.kl, model_kl(model, sae, ids, found.sites), rtol=1e-3, atol=1e-6)


# Running the model


@pytest.fixture(scope="module")
def language_model():
    from transformers import ArceeConfig, ArceeForCausalLM

    torch.manual_seed(0)
    config = ArceeConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=50,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return ArceeForCausalLM(config).eval()


def padded_batches():
    ids = token_ids(0, 5, 9, words=50)
    mask, special = torch.ones_like(ids), torch.zeros_like(ids)
    mask[3:, 6:] = 0
    special[:, 3] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "special_tokens_mask": special}
    return [batch, {name: rows[:2, :4] for name, rows in batch.items()}]


def by_hand(model, hook, batch, row, position, moved, last=None):
    """Log-probabilities of one context with one token moved, and the output of `last`, by a plain hook."""
    kept = {}

    def move(module, given, output):
        output = output.clone()
        output[0, position] = moved
        return output

    handles = [model.get_submodule(hook).register_forward_hook(move)]
    if last:
        keep = lambda module, given, output: kept.update(output=output)  # noqa: E731
        handles.append(model.get_submodule(last).register_forward_hook(keep))
    with torch.no_grad():
        logits = model(**{name: rows[row : row + 1] for name, rows in batch.items() if name[0] != "s"}).logits
    for handle in handles:
        handle.remove()
    return logits[0].double().log_softmax(-1), kept.get("output")


@pytest.mark.parametrize("hook", ["model.layers.1", "model.layers.1.mlp.down_proj", "model.embed_tokens"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_responses_are_those_of_a_full_run(language_model, hook, batch_tokens):
    batches = padded_batches()
    for later in (False, True):
        rerun = Rerun(language_model, hook, batches, later=later, batch_tokens=batch_tokens)
        with torch.no_grad():
            tokens = rerun.tokens()
            site = next(s for s in tokens.sites.tolist() if s[1:] == [4, 2])
            base = tokens.x[tokens.sites.tolist().index(site)]
            rows = base + torch.randn(5, 32, generator=generator(1))
            found = rerun.responses(site, base, rows)
        number, row, position = site
        p = by_hand(language_model, hook, batches[number], row, position, base)[0]
        read = range(position, 6) if later else [position]
        for moved, response in zip(rows, found, strict=True):
            q = by_hand(language_model, hook, batches[number], row, position, moved)[0]
            expected = (p.exp() * (p - q)).sum(-1)[read].mean()
            assert float(response) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        assert hook in rerun.skipped
        assert ("model.layers.0" in rerun.skipped) == ("layers.1" in hook)


def test_distances_are_read_in_the_last_layer_of_the_list(language_model):
    rerun = Rerun(language_model, "model.layers.0", padded_batches(), measure="distance")
    with torch.no_grad():
        tokens = rerun.tokens()
        base = tokens.x[7]
        found = rerun.responses(tokens.sites[7].tolist(), base, base[None] + 1)
    number, row, position = tokens.sites[7].tolist()
    one, two = (
        by_hand(
            language_model, "model.layers.0", padded_batches()[number], row, position, moved, last="model.layers.2"
        )[1][0, position]
        for moved in (base, base + 1)
    )
    assert rerun.last == "model.layers.2"
    assert float(found) == pytest.approx(float((one - two).norm()), rel=1e-4)


def test_padding_special_tokens_and_first_positions_are_left_alone(language_model):
    sites = Rerun(language_model, "model.layers.1", padded_batches(), skip=2).tokens().sites
    assert (sites[:, 2] >= 2).all()
    assert (sites[:, 2] != 3).all()
    assert not ((sites[:, 1] >= 3) & (sites[:, 2] >= 6)).any()
    assert len(sites) == 3 * 6 + 2 * 3 + 2 * 1


def test_tokens_come_from_as_many_contexts_as_there_are(language_model):
    tokens = Rerun(language_model, "model.layers.1", padded_batches()).tokens()
    chosen = tokens.sites[tokens.choose(7, generator())]
    assert len(chosen[:, :2].unique(dim=0)) == 7
    assert len(tokens.choose(len(tokens.x), generator()).unique()) == len(tokens.x)
    with pytest.raises(ValueError, match="n must be in 1"):
        tokens.choose(len(tokens.x) + 1, generator())


class Backwards(nn.Module):
    """Runs its list from the last to the first: what comes before the hook in the list depends on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)])

    def forward(self, x):
        for part in reversed(self.parts):
            x = part(x)
        return x


def test_what_depends_on_the_hook_is_not_skipped():
    model, x = Backwards(), torch.randn(4, 5, 6, generator=generator())
    rerun = Rerun(model, "parts.1", [x], measure="distance", last="parts.0")
    with torch.no_grad():
        tokens = rerun.tokens()
        found = rerun.responses(tokens.sites[0].tolist(), tokens.x[0], tokens.x[:1] + 1)
        expected = (model.parts[0](tokens.x[:1] + 1) - model.parts[0](tokens.x[:1])).norm()
    assert rerun.skipped == []
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_model_is_left_as_it_was(language_model):
    before = {name: rows.clone() for name, rows in language_model.state_dict().items()}
    language_model.train()
    with pytest.raises(ValueError, match="alphas"):
        plateaus(language_model, "model.layers.1", padded_batches(), alphas=[0.2, 0.1])
    found = plateaus(language_model, "model.layers.1", padded_batches(), alphas=[0.5, 1], n=4)
    assert language_model.training
    language_model.eval()
    again = plateaus(language_model, "model.layers.1", iter(padded_batches()), alphas=[0.5, 1], n=4)
    assert torch.equal(found.values, again.values)
    assert found.values.isfinite().all()
    assert all(torch.equal(rows, before[name]) for name, rows in language_model.state_dict().items())
    for module in language_model.modules():
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


# Directions, bases, tables


def test_directions_are_what_they_are_called():
    model = Planted(0)
    x = model.embed(token_ids(0)).flatten(0, 1)
    made = Perturbations(x, model.sae())
    g = generator(3)
    chosen = torch.arange(40)
    base = made.base("real", chosen, g)
    assert torch.equal(base, x[:40])
    found = {kind: made.direction(kind, base, chosen, g) for kind in DIRECTIONS}
    for kind, rows in found.items():
        if kind != "sae_error":
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(40))
    assert found["sae_error"].isnan().all()  # x̂ = x
    strengths = base @ model.features.T
    on = (found["active_latent"] @ model.features.T).argmax(1)
    off = (found["inactive_latent"] @ model.features.T).argmax(1)
    assert (strengths[torch.arange(40), on] > 0.9).all()
    assert (strengths[torch.arange(40), off] < 0.1).all()
    # Activations fill 24 of 32 dimensions, isotropic directions all.
    inside = {kind: float((rows @ model.features.T).square().sum(1).mean()) for kind, rows in found.items()}
    assert inside["isotropic"] < 0.9
    for kind in ("cov_difference", "cov_mixture", "real_difference", "real_mixture"):
        assert inside[kind] == pytest.approx(1, abs=1e-4)
    # Differences with x undo it, mixtures do not know it.
    along = {kind: float((rows * base).sum(1).mean()) for kind, rows in found.items()}
    assert along["real_difference"] < -0.5
    assert along["cov_difference"] < -0.5
    assert abs(along["cov_mixture"]) < 0.25
    assert abs(along["real_mixture"]) < 0.25
    bags = {kind: made.base(kind, chosen, g) for kind in BASES}
    for kind in ("bag", "structured"):
        torch.testing.assert_close(bags[kind].norm(dim=1), base.norm(dim=1))
        assert ((bags[kind] @ model.features.T > 0.1).sum(1) == ACTIVE).all()
    many = made.gaussian(20000, g)
    torch.testing.assert_close(many.mean(0), x.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(many.T.cov(), x.T.cov(), atol=0.01, rtol=0)


def test_kinds_are_known_and_have_what_they_need():
    made = Perturbations(torch.randn(20, 4, generator=generator()))
    chosen = torch.arange(3)
    for make, message in [
        (lambda: made.base("made up", chosen, generator()), "kind of base must be one of real"),
        (lambda: made.direction("sideways", made.x[:3], chosen, generator()), "kind of direction must be one of iso"),
        (lambda: made.base("structured", chosen, generator()), "'structured' needs an sae"),
        (lambda: made.direction("sae_error", made.x[:3], chosen, generator()), "needs an sae"),
        (lambda: made.direction("active_latent", made.x[:3], chosen, generator()), "'active_latent' needs an sae"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    # The only two activations that there are: a difference with the other, or none.
    two = Perturbations(torch.eye(4)[[0, 1]])
    rows = two.direction("real_difference", two.x, torch.arange(2), generator())
    torch.testing.assert_close(rows, torch.tensor([[-1.0, 1, 0, 0], [1, -1, 0, 0]]) / 2**0.5)


def test_an_sae_with_one_latent_has_no_inactive_ones():
    model = Planted(0)
    sae = sk.SAE(D, 1, sk.TopK(1)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(model.features[:1])
        sae.W_dec.copy_(model.features[:1])
        sae.b_enc.fill_(-0.5)
    x = model.embed(token_ids(0)).flatten(0, 1)
    made, on = Perturbations(x, sae), x @ model.features[0] > 0.5
    chosen = torch.arange(len(x))
    active, inactive = (made.direction(f"{name}active_latent", x, chosen, generator()) for name in ("", "in"))
    assert torch.equal(active.isfinite().all(1), on)
    assert torch.equal(inactive.isfinite().all(1), ~on)
    bags = made.base("bag", chosen, generator())
    assert bags[~on].norm(dim=1).max() < 1e-5  # no latent is active: b_dec, which is 0
    torch.testing.assert_close(bags[on], x[on].norm(dim=1)[:, None] * model.features[0].expand(int(on.sum()), D))


def test_structured_bags_keep_the_cosines_with_the_strongest_latent():
    torch.manual_seed(0)
    sae = sk.SAE(16, 400, sk.TopK(4)).eval()
    x = torch.randn(3000, 16)
    made = Perturbations(x, sae)
    unit = normalize(sae.W_dec.detach(), dim=1)
    g, apart = generator(), {False: [], True: []}
    for token in range(50):
        latents, values = made.active[token]
        order = latents[values.argsort(descending=True)]
        for structured, found in apart.items():
            drawn = torch.multinomial(made.counts.double(), len(order), generator=g)
            drawn = made._like(order, drawn[0]) if structured else drawn
            assert len(drawn.unique()) == len(order)
            found.append(float((unit[drawn] @ unit[drawn[0]] - unit[order] @ unit[order[0]]).abs().mean()))
    assert sum(apart[True]) < 0.1 * sum(apart[False])


def test_tables_and_plots():
    model = Planted(0)
    found = plateaus(
        model, "blocks.1", [token_ids(0)], model.sae(), measure="distance", alphas=[0.5, 1], n=6, batch_tokens=50
    )
    assert found.directions == tuple(DIRECTIONS)
    curves = found.curves
    assert len(curves) == 2 * 8 * 6 * 3
    row = curves[(curves.base == "random") & (curves.direction == "real_mixture") & (curves.alpha == 1.0)]
    assert row.value.tolist() == found.values[1, found.directions.index("real_mixture"), :, 2].tolist()
    summary = found.summary()
    assert (summary.low <= summary["mean"] + 1e-9).sum() == summary["mean"].notna().sum()
    # There is no error at real bases, so nothing to compare; at random ones there is.
    assert math.isnan(found.differences["sae_error − isotropic"].value)
    assert math.isnan(found.results["sae_error − isotropic"].p)
    assert len(found.plot().axes) == 2
    assert set(found.to_frame().measure) == {result.name for result in found.results.values()}
    assert json.dumps([record for result in found.results.values() for record in result.to_records()])
    same = found.difference("area", ("real", "isotropic"), ("real", "isotropic"))
    assert (same.value, same.low, same.high, same.result.p) == (0, 0, 0, 1)
    for arguments in [("depth",), ("width", "made up"), ("width", "real", "sideways")]:
        with pytest.raises(ValueError, match="must be one of"):
            found.metric(*arguments)


def test_labels_swapped_give_a_uniform_p():
    """Between two draws of one kind of direction: p below 0.2 in 9 of 40 runs, 8 expected."""
    model = nn.Sequential(nn.Embedding(100, 8), nn.Identity(), nn.Linear(8, 8), nn.Tanh())
    torch.manual_seed(0)
    model[2].weight.data = torch.randn(8, 8)
    low = 0
    for seed in range(40):
        kinds = ["cov_mixture", "real_mixture"]  # the data is Gaussian
        found = plateaus(model, "1", [token_ids(seed)], None, kinds, ["real"], [0.3], 16, seed, measure="distance")
        low += found.results["real_mixture − cov_mixture"].p < 0.2
    assert 2 <= low <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": "blocks.9"}, "nearest names"),
        ({"last": "nothing"}, "nearest names"),
        ({"measure": "cosine"}, "measure must be one of kl, distance"),
        ({"measure": "kl", "hook": "blocks"}, "does not run"),
        ({"directions": ["sideways"]}, "directions must be different names among"),
        ({"directions": "isotropic"}, "directions must be different names among"),
        ({"bases": []}, "bases must be different names among"),
        ({"bases": ["real", "real"]}, "bases must be different names among"),
        ({"directions": ["sae_error"]}, "need an sae"),
        ({"bases": ["bag"]}, "need an sae"),
        ({"alphas": [0, 1]}, "alphas must rise"),
        ({"alphas": []}, "alphas must rise"),
        ({"alphas": [math.nan]}, "alphas must rise"),
        ({"n": 0}, "n must be in 1"),
        ({"n": 10**6}, "n must be in 1"),
        ({"share": 1}, "share must be"),
        ({"skip": -1}, "skip must not be negative"),
        ({"skip": 6}, "two tokens at least"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"batches": []}, "batches must hold"),
        ({"batches": [torch.zeros(3).long()]}, "must begin with a tensor"),
        ({"batches": [torch.zeros(3, 5).long()], "n": 2}, "must not be all equal"),
        ({"sae": sk.SAE(D + 1, 8, sk.TopK(1))}, "rows of 32 numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    given = {"model": Planted(0), "hook": "blocks.1", "batches": [token_ids(0)], "measure": "distance", **options}
    with pytest.raises(ValueError, match=message):
        plateaus(**given)


def test_sae_without_latents_nan_and_deaf_models_are_refused():
    model, ids = Planted(0), [token_ids(0)]
    silent = model.sae()
    silent.b_enc.data -= 10
    with pytest.raises(ValueError, match="all are silent"):
        plateaus(model, "blocks.1", ids, silent, measure="distance")
    model.embed.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        plateaus(model, "blocks.1", ids, measure="distance")
    model.blocks[2].low = 100
    model.embed.weight.data[3] = 0
    with pytest.raises(ValueError, match="must matter"):
        plateaus(model, "blocks.1", ids, measure="distance")
    with pytest.raises(ValueError, match="no logits"):
        plateaus(nn.Sequential(nn.Embedding(100, 4), nn.Flatten(1)), "0", ids, n=2)
    with pytest.raises(ValueError, match="nulls must be different names"):
        sae_error_kl(model, "blocks.1", silent, ids, nulls=["sae_error"])
    with pytest.raises(ValueError, match="n_null must be at least 1"):
        sae_error_kl(model, "blocks.1", silent, ids, n_null=0)
    found = sae_error_kl(Planted(0), "blocks.1", Planted(0).sae(), ids, n=3, n_null=2, measure="distance")
    assert found.results["kl"].value == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="null must be one of"):
        found.ratio("real_mixture")
