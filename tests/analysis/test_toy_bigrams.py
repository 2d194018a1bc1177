"""Tokens in contexts: the tables are what they promise, kinds are told apart, and what outputs need is found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.analysis import toy
from sparsekern.analysis.toy import Bigrams, bigrams, response_shares

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Data


@given(st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.floats(0, 2), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_token_a_context_and_what_follows(tokens, contexts, rho, zipf, correlation, seed):
    made = Bigrams(tokens, contexts, 5, rho, 2.0, zipf, correlation, generator(seed))
    pairs = tokens * contexts
    torch.testing.assert_close(made.outputs.sum(1), torch.ones(pairs))
    torch.testing.assert_close(made.frequency.sum(), torch.tensor(1.0))
    activations, x = made.sample(40, generator(seed + 1))
    torch.testing.assert_close(x, activations @ made.features)
    torch.testing.assert_close(x, made.x[made.draw(40, generator(seed + 1))])
    assert (activations.sum(1) == 2).all()
    assert (activations[:, :tokens].sum(1) == 1).all()
    # Shuffled contexts leave what follows a token, and nothing of the context.
    without = made.without_context().view(tokens, contexts, -1)
    torch.testing.assert_close(without, without[:, :1].expand_as(without))
    joint = made.frequency[..., None] * made.outputs.view(tokens, contexts, -1)
    torch.testing.assert_close(joint.sum(1), made.frequency.sum(1)[:, None] * without[:, 0])


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
def test_tables_of_two_contexts_correlate_by_rho(rho):
    logits = Bigrams(60, 4, 60, rho, 1.5, generator=generator()).outputs.log().view(60, 4, 60).double()
    logits = (logits - logits.mean(2, keepdim=True)).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(logits)
    # The spread of a correlation of 3,600 numbers is 0.017; largest deviation seen in five seeds 0.04.
    assert (correlation - torch.full((4, 4), rho).fill_diagonal_(1)).abs().max() < 0.06
    assert float(logits.std()) == pytest.approx(1.5, rel=0.05)


def test_tokens_are_zipf_and_prefer_a_context():
    made = Bigrams(4, 3, correlation=0.4, zipf=2.0, generator=generator())
    of_token = made.frequency.sum(1)
    torch.testing.assert_close(of_token / of_token[0], torch.tensor([1, 1 / 4, 1 / 9, 1 / 16]))
    given_token = made.frequency / of_token[:, None]
    torch.testing.assert_close(given_token[3], torch.tensor([0.6, 0.2, 0.2]))  # 3 modulo 3
    torch.testing.assert_close(given_token[1], torch.tensor([0.2, 0.6, 0.2]))
    drawn = made.draw(40_000, generator(1)).bincount(minlength=12) / 40_000
    assert (drawn - made.frequency.flatten()).abs().max() < 0.0125  # 5 standard errors


def test_worlds_of_one_generator_differ_in_rho_only():
    low, high = (Bigrams(rho=rho, generator=generator(3)) for rho in (0.0, 1.0))
    torch.testing.assert_close(low.features, high.features)
    same = high.outputs.view(8, 4, -1)
    torch.testing.assert_close(same, same[:, :1].expand_as(same))
    assert (low.outputs - high.outputs).abs().max() > 0.1


# Kinds of latents


@given(st.integers(3, 7), st.integers(3, 6), st.integers(0, 2**31), st.floats(0.1, 100), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_shares_of_planted_responses(tokens, contexts, seed, factor, offset):
    draw = generator(seed)
    of_token, of_context = torch.rand(tokens, 1, generator=draw), torch.rand(1, contexts, generator=draw)
    pair = torch.zeros(tokens, contexts)
    pair[tokens // 2, contexts - 1] = 1
    planted = torch.stack([of_token.expand_as(pair), of_context.expand_as(pair), pair, of_token + of_context])
    shares = response_shares(planted)
    torch.testing.assert_close(shares.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(shares[0], torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(shares[1], torch.tensor([0, 1.0, 0], dtype=torch.float64), atol=1e-9, rtol=0)
    interaction = (1 - 1 / tokens) * (1 - 1 / contexts) / (1 - 1 / (tokens * contexts))
    assert float(shares[2, 2]) == pytest.approx(interaction)
    assert shares[2].argmax() == 2
    assert float(shares[3, 2]) == pytest.approx(0, abs=1e-9)  # parts that add up do not make a composite
    # Neither units nor the order of tokens and contexts matter; with them exchanged so are their shares.
    drawn = torch.rand(3, tokens, contexts, generator=draw, dtype=torch.float64)
    rows, columns = torch.randperm(tokens, generator=draw), torch.randperm(contexts, generator=draw)
    torch.testing.assert_close(response_shares(factor * drawn[:, rows][:, :, columns] + offset), response_shares(drawn))
    torch.testing.assert_close(response_shares(drawn.mT), response_shares(drawn)[:, [1, 0, 2]])


@pytest.mark.parametrize("contexts", [3, 4, 5, 8])
def test_a_token_in_fewer_than_half_of_the_contexts_is_a_composite(contexts):
    for active in range(1, contexts + 1):
        response = torch.zeros(1, 6, contexts)
        response[0, 2, :active] = 1
        if 2 * active != contexts:
            assert response_shares(response).argmax() == (2 if 2 * active < contexts else 0)


def test_what_is_equal_everywhere_has_no_shares():
    responses = torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.1), torch.full((3, 4), 1e4)])
    assert response_shares(responses).isnan().all()
    assert response_shares(torch.empty(0, 3, 4)).shape == (0, 3)
    for bad in (torch.ones(3, 4), torch.ones(2, 0, 4)):
        with pytest.raises(ValueError, match=r"responses must have shape \[n, tokens, contexts\]"):
            response_shares(bad)


# SAEs that are planted in a hidden layer of parts


def planted(parts, composites, reads, tokens=4, contexts=3):
    """What is measured of an SAE, some of whose latents are parts, others composites, one constant and one silent."""
    made = Bigrams(tokens, contexts, generator=generator())
    both = torch.eye(tokens + contexts)
    x = (both[:tokens, None] + both[tokens:]).flatten(0, 1)
    rows, bias = [], []
    if parts:
        rows, bias = [*both], [0.0] * len(both)
    if composites:
        rows, bias = [*rows, *x], bias + [-1.0] * len(x)
    sae = sk.SAE(len(both), len(rows) + 2, sk.ReLU(), generator=generator(1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.stack([*rows, 0 * both[0], 0 * both[0]]))
        sae.W_dec.copy_(torch.stack([*rows, 0 * both[0], both[0]]))
        sae.b_enc.copy_(torch.tensor([*bias, 1.0, -1.0]))
    w_out = torch.randn(len(both), 6, generator=generator(2))
    w_out[tokens:] *= reads != "token"
    w_out[:tokens] *= reads != "context"
    net = bigrams._Net(both, torch.zeros(1, len(both)), w_out, torch.zeros(1, 6))
    return bigrams._measure(sae.eval(), net, x, made, 30, generator(4))


def test_parts_and_composites_are_counted():
    found = planted(True, False, "token")
    assert found.counts.tolist() == [4, 3, 0]
    assert found.alive == 8  # the constant one too, of no kind
    assert found.mass == 0
    assert math.isnan(found.pairs)
    assert found.kl.isnan().all()
    assert found.others.isnan().all()
    assert found.fvu == pytest.approx(0, abs=1e-6)
    assert found.l0 == pytest.approx(3)
    found = planted(False, True, "token")
    assert found.counts.tolist() == [0, 0, 12]
    assert found.alive == 13
    assert found.pairs == pytest.approx(1)
    assert found.mass == pytest.approx(1)  # the constant one writes nothing
    assert found.fvu == pytest.approx(0, abs=1e-6)
    assert found.l0 == pytest.approx(2)
    assert planted(True, True, "both").counts.tolist() == [4, 3, 12]


def test_a_parent_says_what_the_output_reads_of_the_token_and_nothing_else():
    # The mean over contexts has the token's part in full: nothing is lost to a net that reads no context.
    parent, context, nothing = planted(False, True, "token").kl.tolist()
    assert parent == pytest.approx(0, abs=1e-6)
    assert context > 0.05
    assert nothing > 0.1
    parent, context, nothing = planted(False, True, "context").kl.tolist()
    assert parent > 0.05
    assert context == pytest.approx(0, abs=1e-6)
    found = planted(False, True, "both")
    assert 0 < float(found.kl[0]) < float(found.kl[2])
    latent, token = found.others
    assert found.others.shape == (2, 30)
    assert float(latent.min()) > float(found.kl[0])
    assert float(token.min()) > float(found.kl[0])


# Nets and SAEs that are trained

SMALL = {"rhos": (0.0, 1.0), "widths": (24,), "l1": (0.1,), "worlds": 1, "net_steps": 250, "steps": 40, "n_null": 20}


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_need_composites_only_where_they_disagree(seed):
    found = toy.bigram_splitting(seed, **SMALL)
    assert found.net_kl[:2].max() < 0.05  # 0.01 to 0.03
    low, high = found.results["kl_0"], found.results["kl_1"]
    assert low.value > 0.3  # 0.49 to 0.78 over eight seeds
    assert high.value < 0.03  # 0.00 to 0.01
    assert low.p == high.p == pytest.approx(1 / 21)
    assert float(low.controls["shuffled context"]) < 0.03  # 0.00
    assert found.results["kept"].value < -0.5  # −0.89 to −0.63
    # Where the net does not need the context it keeps less of it, and less than it began with.
    context = found.hidden[:, 0, :, 1:].sum(2)
    assert context[0, 1] < 0.7 * context[2, 0]  # 0.32 to 0.53
    assert context[0, 0] > 1.5 * context[0, 1]  # 2.0 to 4.3
    torch.testing.assert_close(found.hidden.sum(3), torch.ones(3, 1, 2, dtype=torch.float64))
    # An untrained net has composites too, so they show nothing by themselves.
    assert found.counts[2, ..., 2].min() > 8  # 13 to 15 of 24
    assert found.results["composites_0"].value < float(found.results["composites_0"].null.min())


def test_a_run_has_its_tables_and_its_seed():
    options = {**SMALL, "l1": (0.1, 0.3), "worlds": 2, "net_steps": 20, "steps": 2}
    found, again = (toy.bigram_splitting(3, **options, progress=progress) for progress in (True, False))
    shape = (3, 2, 2, 1, 2)
    assert found.counts.shape == (*shape, 3)
    assert found.kl.shape == (*shape, 3)
    for name in ("counts", "alive", "mass", "pairs", "kl", "fvu", "l0", "hidden", "net_kl"):
        tensor = getattr(found, name)
        assert tensor.shape[:3] == shape[:3]
        torch.testing.assert_close(tensor, getattr(again, name), equal_nan=True)
    for name, result in found.results.items():
        assert result.value == again.results[name].value or math.isnan(result.value)
        for null, drawn in result.nulls.items():
            assert drawn.shape == (20,)
            torch.testing.assert_close(drawn, again.results[name].nulls[null], equal_nan=True)
    torch.testing.assert_close(found.hidden[0, :, 1], found.hidden[1, :, 1])  # nothing to shuffle at ρ = 1
    torch.testing.assert_close(found.counts[2, :, 0], found.counts[2, :, 1])
    assert (found.counts.sum(-1) <= found.alive).all()
    records = found.to_records()
    assert len(records) == 24
    assert records[-1]["net"] == "untrained"
    assert records[1]["l1"] == 0.3
    assert records[1]["composite"] == found.counts[0, 0, 0, 0, 1, 2]
    assert set(found.to_frame()["measure"]) == {result.name for result in found.results.values()}
    assert found.plot().get_xlabel() == found.plot_kl().get_xlabel() == "ρ: correlation of outputs between contexts"


@pytest.mark.parametrize("start", ["parts", "pairs", "random"])
def test_one_latent_and_no_null(start):
    found = toy.bigram_splitting(**{**SMALL, "widths": (1,), "net_steps": 1, "steps": 1, "n_null": 0}, start=start)
    assert math.isnan(found.results["composites"].p)
    assert (found.alive <= 1).all()
    assert found.plot() is not None
    assert found.plot_kl() is not None


def test_more_latents_than_parts_and_pairs():
    found = toy.bigram_splitting(**{**SMALL, "widths": (60,), "steps": 2, "net_steps": 2, "n_null": 2})
    assert found.fvu.isfinite().all()


def test_a_hidden_layer_that_is_silent_is_refused(monkeypatch):
    silent = bigrams._Net(torch.zeros(12, 5), -torch.ones(1, 5), torch.zeros(5, 16), torch.zeros(1, 16))
    monkeypatch.setattr(bigrams._Net, "drawn", lambda *_: silent)
    with pytest.raises(ValueError, match="hidden must be so many units that some is active, which none of 5 is"):
        toy.bigram_splitting(**SMALL, hidden=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bigrams(0), "tokens must be at least 1, got 0"),
        (lambda: Bigrams(outputs=1), "outputs must be at least 2, got 1"),
        (lambda: Bigrams(rho=1.1), r"rho must be in 0 … 1, got 1.1"),
        (lambda: Bigrams(correlation=math.nan), r"correlation must be in 0 … 1, got nan"),
        (lambda: Bigrams(scale=0), "scale must be above 0, got 0"),
        (lambda: Bigrams(zipf=-1), "zipf must not be negative, got -1"),
        (lambda: toy.bigram_splitting(rhos=(1.0,)), r"rhos must be at least two rising numbers, got \[1.0\]"),
        (lambda: toy.bigram_splitting(rhos=(1.0, 0.0)), "rhos must be at least two rising numbers"),
        (lambda: toy.bigram_splitting(rhos=(0.0, 2.0)), "rho must be in 0 … 1, got 2.0"),
        (lambda: toy.bigram_splitting(widths=()), "widths and l1 must not be empty"),
        (lambda: toy.bigram_splitting(contexts=2), "contexts must be at least 3, got 2"),
        (lambda: toy.bigram_splitting(worlds=0), "worlds must be at least 1, got 0"),
        (lambda: toy.bigram_splitting(steps=0), "steps must be at least 1, got 0"),
        (lambda: toy.bigram_splitting(n_null=-1), "n_null must be at least 0, got -1"),
        (lambda: toy.bigram_splitting(start="truth"), "start must be one of parts, pairs, random, got 'truth'"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
