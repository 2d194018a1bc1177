"""Adam over factored gradients against torch.optim.Adam, and what a training step keeps out of memory."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import cpu
from sparsekern.factors import OuterProducts, identity, kept_as_factors
from sparsekern.ops import sparse_decode
from sparsekern.ops._sparse_decode import sum_of_outer_products
from sparsekern.optim import Adam

needs_native = pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")


def make(d=12, n=40, k=4, **options):
    return sk.SAE(d, n, sk.TopK(k, screen="int8"), generator=torch.Generator().manual_seed(1), **options)


def train(sae, batches, monkeypatch, backend, **options):
    """A few steps with the kernels, or without them."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
    if backend == "reference":
        sae.activation.screen = "auto"
    trainer = sk.Trainer(sae, lr=1e-2, **options)
    return trainer, [trainer.step(x) for x in batches]


@needs_native
@pytest.mark.parametrize("clip_norm", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "d", "n", "k"), [(40, 12, 40, 4), (33, 67, 250, 9), (2, 1, 3, 1), (64, 128, 1024, 16)]
)
def test_equal_to_torch_adam(monkeypatch, clip_norm, pre_bias, rows, d, n, k):
    batches = torch.randn(5, rows, d)
    options = {"pre_bias": pre_bias, "dead_after": 2 * rows, "aux_coefficient": 0.5}
    fused, plain = make(d, n, k, **options), make(d, n, k, **options)
    mine, my_stats = train(fused, batches, monkeypatch, "cpu", clip_norm=clip_norm)
    theirs, their_stats = train(plain, batches, monkeypatch, "reference", clip_norm=clip_norm)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        for key, moment in mine.optimizer.state[a].items():
            torch.testing.assert_close(
                moment, theirs.optimizer.state[b][key], rtol=1e-4, atol=1e-7, msg=f"{name} {key}"
            )
    for a, b in zip(my_stats, their_stats, strict=True):
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=1e-7)


@needs_native
def test_one_update_equals_torch_adam_to_a_millionth():
    """The kernel alone, on weights of unit scale, over many steps and with idle rows between."""
    weight = torch.randn(300, 37)
    other = torch.nn.Parameter(weight.clone())
    state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    adam = torch.optim.Adam([other], lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    for step in range(50):
        indices = torch.randint(0, 300 if step % 2 else 20, (8, 3), dtype=torch.int32)
        values, vectors = torch.randn(8, 3), torch.randn(8, 37)
        factors = cpu.SortedFactors([OuterProducts(values, indices, vectors)], 300)
        options = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8}
        cpu.row_adam(factors, weight, False, state, **options, clip=1.0, rest_after=None, copy=None)
        other.grad = cpu.scatter_outer(values, indices, vectors, 300)
        adam.step()
    torch.testing.assert_close(weight, other.detach(), rtol=1e-6, atol=1e-6)


@needs_native
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 50), st.integers(1, 4), st.booleans(), st.integers(0, 9**9))
def test_norms_of_factored_gradients(parts, rows, n, k, unit_rows, seed):
    torch.manual_seed(seed)
    d = 1 + seed % 70
    weight = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    factors = []
    for i in range(parts):
        values, indices = torch.randn(rows, k), torch.randint(0, n, (rows, k), dtype=torch.int32)
        crow = None
        if (seed + i) % 2:  # the same entries over rows of any length
            crow = torch.randint(0, rows * k + 1, (rows + 1,)).sort().values
            crow[0], crow[-1], values, indices = 0, rows * k, values.flatten(), indices.flatten()
        factors.append(OuterProducts(values, indices, torch.randn(rows, d), crow))
    dense = sum(sum_of_outer_products(part, n).double() for part in factors)
    if unit_rows:
        dense = dense - (dense * weight).sum(1, keepdim=True) * weight
    found = cpu.SortedFactors(factors, n)
    got = cpu.gradient_squares(found, weight, unit_rows)
    torch.testing.assert_close(got, dense.square().sum(), rtol=1e-4, atol=1e-6)
    assert found.square_bound() >= got * (1 - 1e-4)


@needs_native
@pytest.mark.parametrize("clip_norm", [1e-3, float("inf")])
@pytest.mark.parametrize("threshold", [0.5, 1e9])
def test_gradients_in_csr_form_stay_factored_and_equal_torch(monkeypatch, clip_norm, threshold):
    """Rows with any number of entries, and none at all; a row of huge norm has most."""
    x = torch.randn(30, 12)
    x[7] *= 50
    results = []
    for backend in ("", "reference"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", backend)  # empty for none
        sae = sk.SAE(12, 200, sk.TopK(4), generator=torch.Generator().manual_seed(1))
        adam = Adam(sae)
        for _ in range(3):
            codes = sk.threshold_encode(x, sae.W_enc, sae.b_enc, threshold, center=sae.b_dec)
            loss = (sk.sparse_decode(codes, sae.W_dec, sae.b_dec) - x).square().mean()
            norm = adam.step(loss, lr=1e-2, clip_norm=clip_norm)
            assert (sae.W_enc.grad is None) == (backend == "")
            results.append(norm)
        results.append(sae.state_dict())
    half = len(results) // 2
    torch.testing.assert_close(results[: half - 1], results[half:-1], rtol=1e-4, atol=1e-6)
    for name, tensor in results[half - 1].items():
        torch.testing.assert_close(tensor, results[-1][name], rtol=1e-4, atol=1e-6, msg=name)


@needs_native
def test_backward_leaves_no_dense_gradient_where_factors_are_kept():
    sae = make()
    with kept_as_factors([sae.W_enc, sae.W_dec]) as kept:
        sae.loss(torch.randn(30, 12)).total.backward()
    assert sae.W_enc.grad is None
    assert sae.W_dec.grad is None
    assert [len(parts) for parts in kept.values()] == [1, 1]
    assert sae.b_dec.grad is not None
    sae.loss(torch.randn(30, 12)).total.backward()
    assert sae.W_enc.grad is not None  # for everybody else


@needs_native
def test_a_second_collection_is_refused_and_the_first_survives_errors():
    weight = torch.randn(3, 2)
    with kept_as_factors([weight]), pytest.raises(RuntimeError, match="one such backward pass"), kept_as_factors([]):
        pass
    with kept_as_factors([weight]):
        pass


@needs_native
def test_a_penalty_of_the_users_own_reaches_the_weights(monkeypatch):
    """Its gradient is dense, so the step goes through torch, with the factors added in."""
    x = torch.randn(40, 12)
    results = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
        sae = sk.SAE(12, 40, sk.TopK(4), generator=torch.Generator().manual_seed(1))
        adam = Adam(sae)
        for _ in range(3):
            loss = sae.loss(x).total + 0.1 * sae.W_dec.abs().sum() + 0.01 * sae.W_enc.square().sum()
            adam.step(loss, lr=1e-2, clip_norm=1.0)
        results.append(sae.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-6, msg=name)


@needs_native
def test_the_int8_copy_follows_the_weights():
    torch.manual_seed(0)
    sae = sk.SAE(64, 2048, sk.TopK(8))
    trainer = sk.Trainer(sae, lr=1e-2)
    x = torch.randn(100, 64)
    for _ in range(3):
        trainer.step(x)
    if not cpu.screens(2048, 64):
        pytest.skip("no screening at this instruction set")
    kept = trainer.optimizer._copies[sae.W_enc]
    fresh = cpu.Quantized(sae.W_enc.detach())
    for name in ("packed", "scale", "error", "norm"):
        assert torch.equal(getattr(kept, name), getattr(fresh, name)), name
    assert kept.is_current(sae.W_enc)
    with torch.no_grad():
        sae.W_enc[5] = x[0]  # as somebody would who revives a dead latent
    assert not kept.is_current(sae.W_enc)
    trainer.step(x)
    trainer.step(x)
    fresh = cpu.Quantized(sae.W_enc.detach())
    assert torch.equal(trainer.optimizer._copies[sae.W_enc].packed, fresh.packed)


@needs_native
class TestRest:
    """Rows that have had no gradient for a while are left alone, and wake up as if time had passed."""

    def run(self, rest_after, steps=12):
        torch.manual_seed(0)
        weight, batches = torch.randn(6, 5), torch.randn(steps, 2, 5)
        state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(6, 5), "exp_avg_sq": torch.zeros(6, 5)}
        history = []
        for step, vectors in enumerate(batches):
            # Latent 0 fires always, 1 in the first and the last step, 5 never.
            second = 1 if step in (0, steps - 1) else 2
            indices = torch.tensor([[0], [second]], dtype=torch.int32)
            factors = cpu.SortedFactors([OuterProducts(torch.ones(2, 1), indices, vectors)], 6)
            options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0}
            cpu.row_adam(factors, weight, False, state, **options, rest_after=rest_after, copy=None)
            history.append((weight.clone(), copy.deepcopy(state)))
        return history

    def test_a_long_patience_is_adam(self):
        for (mine, _), (theirs, _) in zip(self.run(100), self.run(None), strict=True):
            assert torch.equal(mine, theirs)

    def test_a_row_rests_and_its_moments_catch_up(self):
        resting, always = self.run(3), self.run(None)
        for step in range(12):
            same = torch.equal(resting[step][0][1], always[step][0][1])
            assert same == (step < 3)
            assert torch.equal(resting[step][0][0], always[step][0][0])
            assert torch.equal(resting[step][0][5], always[step][0][5])
        assert torch.equal(resting[10][0][1], resting[3][0][1])
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(resting[11][1][moment][1], always[11][1][moment][1])

    def test_a_run_with_rest_resumes_to_the_same_bits(self):
        batches = torch.randn(9, 30, 12)
        whole = sk.Trainer(make(n=200), lr=1e-2, rest_after=2)
        for x in batches:
            whole.step(x)
        first, second = (sk.Trainer(make(n=200), lr=1e-2, rest_after=2) for _ in range(2))
        for x in batches[:5]:
            first.step(x)
        second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
        for x in batches[5:]:
            second.step(x)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), name


def test_rest_needs_the_kernels(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    with pytest.raises(ValueError, match="rest_after needs the CPU kernels"):
        sk.Trainer(make(), rest_after=5)


@needs_native
def test_decoding_alone_keeps_factors_too():
    weight = torch.randn(20, 6, requires_grad=True)
    codes = sk.SparseCodes(torch.rand(5, 3, requires_grad=True), torch.randint(0, 20, (5, 3), dtype=torch.int32), 20)
    with kept_as_factors([weight]) as kept:
        sparse_decode(codes, weight).sum().backward()
    (part,) = kept[identity(weight)]
    assert part.vectors.shape == (5, 6)
    assert weight.grad is None
