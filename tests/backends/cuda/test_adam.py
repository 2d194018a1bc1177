"""Adam over factored gradients by the CUDA C++ kernels, in emulation, against torch.optim.Adam in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import cuda, reference
from sparsekern.backends.cuda import _library, adam
from sparsekern.backends.screening import LIMITS, Cast
from sparsekern.factors import OuterProducts

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
N = 9
FINITE = torch.tensor(True)


@pytest.fixture(autouse=True)
def _emulated(emulated, monkeypatch):
    """The kernels run on CPU tensors, and latents of a few entries are long."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    monkeypatch.setattr(adam, "SPLIT", 4)
    with _library.emulating(emulated):
        yield


@pytest.fixture
def slices(monkeypatch):
    """Slices of 8 columns; unit rows in lots of three latents."""
    monkeypatch.setattr(adam, "slice_width", lambda parts, cost: 8)
    monkeypatch.setattr(adam, "WORKSPACE_BYTES", 3 * 4 * 20)


def random_weight(d, n=N):
    return torch.nn.functional.normalize(torch.randn(n, d), dim=1)


def random_parts(d, kinds, transposed=False):
    """Outer products of several widths, where latent 0 has many entries and the last two latents none.

    Those of the kind "csr" have from none to all latents a row. `transposed` vectors are not contiguous.
    """
    parts = []
    for part, kind in enumerate(kinds):
        if kind == "csr":
            parts.append(csr_part(d))
            continue
        rows, k = (7, 2) if part != 1 else (5, 3)
        indices = torch.randint(1, N - 2, (rows, k), dtype=torch.int32)
        indices[:, 0] = 0
        values = torch.randn(rows, k) * (torch.rand(rows, k) > 0.2)
        vectors = torch.randn(d, rows).T if transposed else torch.randn(rows, d)
        parts.append(OuterProducts(values, indices, vectors))
    return parts


def csr_part(d, rows=6):
    """Entries of rows of which the first and the last have none, and one has all; latent 0 is in all others."""
    dense = torch.randn(rows, N - 2) * (torch.rand(rows, N - 2) > 0.6)
    dense[:, 0] = 1.0
    dense[2] = torch.randn(N - 2)
    dense[0] = dense[-1] = 0
    row, col = dense.nonzero(as_tuple=True)
    values = dense[row, col] * (torch.rand(len(row)) > 0.2)  # some entries that are zero
    crow = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    return OuterProducts(values, col.int(), torch.randn(rows, d), crow)


def fresh_state(weight):
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def dense_gradient(parts, weight, unit_rows):
    """In float64, projected where the rows are to keep their norm."""
    gradient = sum(dense_part(*part) for part in parts)
    return gradient - (gradient * weight).sum(1, keepdim=True) * weight if unit_rows else gradient


def dense_part(values, indices, vectors, crow):
    if crow is None:
        return reference.scatter_outer(values.double(), indices, vectors.double(), N)
    return reference.csr_scatter_outer(values.double(), crow, indices, vectors.double(), N)


def step(parts, weight, unit_rows, state, clip_norm=float("inf"), kept=None, finite=FINITE, rest=0.0):
    """One step of Adam with the kernels; the squares of the gradient and the clipping factor."""
    factors = adam.SortedFactors(parts, weight.shape[0])
    clip = adam.clip_factor([(factors, weight, unit_rows)], torch.as_tensor(rest, dtype=torch.float64), clip_norm)
    squares = adam.row_adam(factors, weight, unit_rows, state, **OPTIONS, clip=clip, copy=kept, finite=finite)
    return squares, clip


# Entries sorted by latent


@given(st.integers(0, 600), st.sampled_from([1, 7, 256, 257, 70_000]), st.integers(1, 9), st.integers(0, 9**9))
@settings(max_examples=25)
def test_entries_by_latent(entries, d_sae, split, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, d_sae, (entries,), dtype=torch.int32, generator=generator)
    indices[torch.rand(entries, generator=generator) < seed % 3 / 3] = d_sae // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam, "SPLIT", split)
        by = adam.ByLatent(indices, d_sae, 1)
    assert torch.equal(by.order, indices.sort(stable=True).indices.int())
    counts = torch.bincount(indices, minlength=d_sae)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert torch.equal(by.start, starts.int())
    pieces = torch.where(counts > split, (counts + split - 1) // split, 0)
    assert torch.equal(by.piece_start, (pieces.cumsum(0) - pieces).int())
    owners = torch.arange(d_sae).repeat_interleave(pieces)
    assert by.piece_latent.shape[0] == 2 * entries // split >= len(owners)
    expected = torch.full_like(by.piece_latent, d_sae)
    expected[: len(owners)] = owners
    assert torch.equal(by.piece_latent, expected)


def test_entries_of_several_tiles_are_ordered_in_any_order_of_execution(monkeypatch):
    indices = torch.randint(0, 300, (9000,), dtype=torch.int32)
    for order in ("", "1", "2"):
        monkeypatch.setenv("SPARSEKERN_EMULATOR_ORDER", order)
        assert torch.equal(adam.ByLatent(indices, 300, 1).order, indices.sort(stable=True).indices.int())


def test_more_entries_than_can_be_counted_are_refused():
    with pytest.raises(ValueError, match=r"split the batch"):
        adam.ByLatent(torch.zeros(1, dtype=torch.int32).expand(adam.MOST_ENTRIES + 1), 1, 1)


# Adam


@pytest.mark.parametrize(
    ("d", "kinds", "unit_rows", "clip_norm"),
    [
        (1, ["fixed"], False, float("inf")),
        (3, ["fixed", "csr"], True, 0.5),
        (17, ["csr"], True, 0.5),
        (130, ["fixed"] * 3, False, 1e4),
        (132, ["fixed", "csr", "fixed", "csr"], True, 0.5),
        (20, ["csr", "fixed", "csr", "fixed", "fixed"], True, 1e4),
        (600, ["fixed", "csr"], True, 0.5),
        (1101, ["fixed"], True, 1e4),
    ],
)
def test_equal_to_torch_adam(d, kinds, unit_rows, clip_norm):
    check_against_torch(d, kinds, unit_rows, clip_norm)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(
    ("d", "kinds", "clip_norm"), [(17, ["fixed"], 0.5), (20, ["csr", "fixed"], 0.5), (40, ["fixed"] * 6, 1e4)]
)
def test_slices_are_equal_to_torch_adam(d, kinds, unit_rows, clip_norm):
    check_against_torch(d, kinds, unit_rows, clip_norm)


@pytest.mark.parametrize(
    ("shape", "encoder", "decoder"),
    [
        ((8192, 4096, 131072, 64), 512, 4096),
        ((8192, 768, 2**20, 32), 768, 768),
        ((8192, 768, 131072, 32), 768, 768),
        ((16384, 2304, 65536, 64), 256, 256),
        ((65536, 2048, 65536, 64), 128, 128),
    ],
)
def test_slices_are_chosen_by_the_bytes_that_they_save(monkeypatch, shape, encoder, decoder):
    """Those of the table in row_adam.cu; the encoder has a copy and the decoder unit rows."""
    rows, d, n, k = shape
    widths = []
    width_of = adam.slice_width
    monkeypatch.setattr(adam, "slice_width", lambda parts, cost: widths.append(width_of(parts, cost)) or widths[-1])
    factors = object.__new__(adam.SortedFactors)
    by = SimpleNamespace(start=empty(0), order=empty(0), row_of=None, piece_start=empty(0), k=k)
    factors._d_sae, factors.parts = n, [adam.Part(empty(rows, k), empty(rows, d), by, empty(0))]
    monkeypatch.setattr(_library, "module_for", lambda tensor: SimpleNamespace(row_adam=lambda *args: None))
    for unit_rows, copied in [(False, (empty(n, d, dtype=torch.float16), *[empty(n)] * 3)), (True, None)]:
        kept = copied and SimpleNamespace(cast=Cast(*copied))
        plan = adam.Step((empty(n, d), empty(n, d)), empty(3), (0.1, 0.001), 1e-8, kept)
        factors.run(empty(n, d), unit_rows, empty((), dtype=torch.bool), plan)
    assert widths == [encoder, decoder]


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def check_against_torch(d, kinds, unit_rows, clip_norm):
    weight, rest = random_weight(d), 2.0
    other = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.Adam([other], **OPTIONS)
    state = fresh_state(weight)
    for transposed in (False, True, False):
        parts = random_parts(d, kinds, transposed)
        squares, clip = step(parts, weight, unit_rows, state, clip_norm, rest=rest)
        other.grad = dense_gradient(parts, other.detach(), unit_rows)
        torch.testing.assert_close(squares, other.grad.square().sum(), rtol=1e-5, atol=1e-12)
        factor = min(1.0, clip_norm / float((rest + other.grad.square().sum()).sqrt() + 1e-6))
        assert clip.item() == pytest.approx(factor, rel=1e-6)
        assert (factor < 1) == (clip_norm < 1)
        other.grad *= factor
        optimizer.step()
        if unit_rows:
            other.data /= other.data.norm(dim=1, keepdim=True)
    for mine, theirs in [(weight, other.detach())] + [(state[name], optimizer.state[other][name]) for name in state]:
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_training_equals_that_of_the_reference(monkeypatch, activation, unit_rows):
    """Whole steps, with latents that revive (AuxK) and clipping: codes of a fixed width and in CSR form."""
    runs = []
    for backend in ("cuda", "reference"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
        chosen = sk.TopK(4) if activation == "topk" else sk.BatchTopK(4)
        options = {"unit_decoder": unit_rows, "dead_after": 48, "aux_coefficient": 0.5}
        sae = sk.SAE(13, 60, chosen, generator=torch.Generator().manual_seed(1), **options)
        trainer = sk.Trainer(sae, lr=1e-2, clip_norm=0.1)
        norms = [trainer.step(x).grad_norm for x in torch.randn(4, 24, 13, generator=torch.Generator().manual_seed(2))]
        state = trainer.optimizer.state
        moments = {f"{name} {key}": t for name, p in sae.named_parameters() for key, t in state[p].items()}
        runs.append((torch.stack([torch.as_tensor(norm) for norm in norms]), {**sae.state_dict(), **moments}))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-7)
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, mine in runs[0][1].items():
        torch.testing.assert_close(mine, runs[1][1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_latents_of_hundreds_of_entries(monkeypatch, unit_rows):
    """Entries that a warp stages in turns, and pieces of as many as on a device."""
    monkeypatch.setattr(adam, "SPLIT", 128)
    rows, weight = 300, random_weight(20)
    indices = torch.stack([torch.zeros(rows), torch.arange(rows) // 100 + 1, torch.arange(rows) % 5 + 4], dim=1).int()
    assert (indices.flatten().bincount() > 128).tolist() == [True] + 8 * [False]
    values, vectors = torch.randn(rows, 3), torch.randn(rows, 20)
    values[torch.rand(rows, 3) < 0.2] = 0
    parts = [OuterProducts(values, indices, vectors)]
    state, expected = fresh_state(weight), dense_gradient(parts, weight.double(), unit_rows)
    squares, _ = step(parts, weight, unit_rows, state)
    torch.testing.assert_close(squares, expected.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(state["exp_avg"].double(), 0.1 * expected, rtol=1e-5, atol=1e-6)


def test_clipping_has_one_norm_for_all_weights():
    weights = [random_weight(17), random_weight(20)]
    parts = [random_parts(17, ["fixed"]), random_parts(20, ["csr"] * 2)]
    both = list(enumerate(zip(parts, weights, strict=True)))
    found = [(adam.SortedFactors(some, N), weight, i == 1) for i, (some, weight) in both]
    exact = sum(dense_gradient(some, weight.double(), i == 1).square().sum() for i, (some, weight) in both)
    clip = adam.clip_factor(found, torch.tensor(5.0, dtype=torch.float64), 0.25)
    assert clip.item() == pytest.approx(0.25 / float((exact + 5).sqrt()), rel=1e-6)


def test_the_bound_on_the_norm_may_be_loose_but_never_low():
    """Where it is above the clipping norm and the norm is not, nothing is clipped."""
    weight, rest = random_weight(19), torch.zeros(())
    (one,) = random_parts(19, ["fixed"])
    opposite = one._replace(values=-0.999 * one.values)
    apart = OuterProducts(one.values[:, :1], torch.arange(7, dtype=torch.int32)[:, None], one.vectors)
    entries = csr_part(19)
    for parts, least, most in [([apart], 1, 1.01), ([one], 1.1, 10), ([entries], 1.1, 10), ([one, opposite], 1e3, 1e9)]:
        factors = adam.SortedFactors(parts, N)
        exact = dense_gradient(parts, weight.double(), False).square().sum()
        assert least <= factors.square_bound().item() / exact <= most
        for share in (0.99, 1.01):
            clip = adam.clip_factor([(factors, weight, False)], rest, share * exact.sqrt().item())
            assert clip.item() == pytest.approx(min(share, 1), rel=1e-3)


def test_without_entries_the_moments_decay():
    weight = random_weight(19)
    state, before = fresh_state(weight), weight.clone()
    state["exp_avg"] += 1
    none = OuterProducts(torch.zeros(0), torch.zeros(0).int(), torch.randn(3, 19), torch.zeros(4).long())
    squares, clip = step([none], weight, False, state, 0.25, rest=1.0)
    assert squares == 0
    assert clip.item() == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(state["exp_avg"], torch.full_like(weight, 0.9))
    assert (weight < before).all()


def test_entries_of_value_zero_add_nothing_whatever_their_vectors_hold():
    weight, (part,) = random_weight(19), random_parts(19, ["fixed"])
    part.values[3] = 0
    other = weight.clone()
    step([part], weight, True, fresh_state(weight))
    part.vectors[3] = torch.inf
    factors = adam.SortedFactors([part], N)
    assert factors.square_bound().isfinite()
    adam.row_adam(factors, other, True, fresh_state(other), **OPTIONS, clip=torch.ones(()), copy=None, finite=FINITE)
    assert torch.equal(weight, other)


def test_factors_of_half_precision_are_taken():
    weight, (part,) = random_weight(20), random_parts(20, ["fixed"])
    other = weight.clone()
    half = part._replace(values=part.values.bfloat16(), vectors=part.vectors.bfloat16())
    step([half], weight, True, fresh_state(weight))
    same = half._replace(values=half.values.float(), vectors=half.vectors.float())
    step([same], other, True, fresh_state(other))
    assert torch.equal(weight, other)


def test_entries_are_sorted_once_for_all_parts_that_share_them():
    one, other = random_parts(19, ["fixed", "csr"])
    again = one._replace(values=one.values * 2, vectors=torch.randn(7, 19))
    parts = adam.SortedFactors([one, again, other], N).parts
    assert parts[0].by is parts[1].by
    assert parts[0].by is not parts[2].by


@pytest.mark.parametrize("split", [1, 4])
def test_vectors_may_lie_beyond_32_bits(monkeypatch, tmp_path, split):
    """Two of them, 8 GB apart in a file that is a hole between them; summed in pieces, and with the row."""
    monkeypatch.setattr(adam, "SPLIT", split)
    far = 2**31 + 4
    memory = torch.from_file(str(tmp_path / "vectors"), shared=True, size=far + 20, dtype=torch.float32)
    vectors = memory.as_strided((2, 20), (far, 1))
    vectors.copy_(torch.randn(2, 20))
    indices = torch.tensor([[0, 0], [3, 3]], dtype=torch.int32)
    rows = adam.SortedFactors([OuterProducts(torch.ones(2, 2), indices, vectors)], N).dense()
    assert torch.equal(rows[[0, 3]], 2 * vectors)


def test_nothing_waits_for_the_device(no_waiting):
    weight, rest = random_weight(19), torch.ones((), dtype=torch.float64)
    state = fresh_state(weight)
    for kinds in (["csr", "fixed"], ["csr", "fixed"] * 3):
        parts = random_parts(19, kinds)
        with no_waiting():
            step(parts, weight, True, state, 0.5, rest=rest)


def test_runs_have_the_same_bits_in_whatever_order_threads_run(monkeypatch):
    weight, parts = random_weight(600), random_parts(600, ["fixed", "csr"])
    results = []
    for order in ("", "", "1", "2"):
        monkeypatch.setenv("SPARSEKERN_EMULATOR_ORDER", order)
        mine = weight.clone()
        state = fresh_state(mine)
        squares, clip = step(parts, mine, True, state, 0.5)
        results.append([mine, squares, clip, *state.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unit_rows", [False, True])
def test_slices_change_no_bit(monkeypatch, unit_rows):
    weight, parts, results = random_weight(44), random_parts(44, ["fixed", "csr"]), []
    for width in (8, 44):
        monkeypatch.setattr(adam, "slice_width", lambda parts, cost, width=width: width)
        mine, kept = weight.clone(), kept_copy(weight, torch.float16)
        state = fresh_state(mine)
        step(parts, mine, unit_rows, state, kept=kept)
        results.append([mine, *state.values(), *kept.cast[:4]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The copy of the weight


def rounded(weight, dtype):
    """What the copy is to be."""
    scale = (weight.abs().amax(1) / LIMITS[dtype]).clamp_min(1e-30) if dtype in LIMITS else None
    factor = 1.0 if scale is None else scale[:, None]
    rows = (weight / factor).to(dtype)
    return Cast(rows, scale, weight.norm(dim=1), (weight - rows.float() * factor).norm(dim=1))


def kept_copy(weight, dtype):
    seen = []
    return SimpleNamespace(cast=rounded(weight, dtype), mark_current=seen.append, seen=seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("d", [17, 20, 600])
def test_the_copy_follows_the_weight(d, unit_rows, dtype, request):
    if d == 20:
        request.getfixturevalue("slices")  # where the copy is made in a pass of its own, or in lots of latents
    weight = random_weight(d)
    kept = kept_copy(weight, dtype)
    before = weight.clone()
    step(random_parts(d, ["fixed"]), weight, unit_rows, fresh_state(weight), kept=kept)
    assert not torch.equal(weight, before)
    assert kept.seen == [weight]
    check_copy(kept.cast, rounded(weight, dtype))


def check_copy(mine, expected):
    assert torch.equal(mine.rows.float(), expected.rows.float())
    assert expected.scale is None or torch.equal(mine.scale, expected.scale)
    torch.testing.assert_close(mine.norm, expected.norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.error, expected.error, rtol=1e-5, atol=1e-7)


def test_a_trainer_keeps_the_copy_that_the_encoder_reads(monkeypatch):
    monkeypatch.setattr(cuda, "screens", lambda n, d: True)
    sae = sk.SAE(20, 300, sk.TopK(4), generator=torch.Generator().manual_seed(1))
    trainer = sk.Trainer(sae, lr=1e-2)
    for x in torch.randn(3, 16, 20):
        trainer.step(x)
    kept = trainer.optimizer._copies[sae.W_enc]
    assert kept.is_current(sae.W_enc)
    check_copy(kept.cast, rounded(sae.W_enc.detach(), kept.cast.rows.dtype))


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("d", [19, 20])
def test_a_step_that_is_not_finite_changes_no_byte(d, unit_rows, request):
    if d == 20:
        request.getfixturevalue("slices")
    weight = random_weight(d)
    state, kept, parts = fresh_state(weight), kept_copy(weight, torch.float16), random_parts(d, ["fixed", "csr"])
    step(parts, weight, unit_rows, state, kept=kept)
    before = copy.deepcopy((weight, state, kept.cast))
    broken = [part._replace(vectors=part.vectors * torch.nan) for part in parts]
    assert step(broken, weight, unit_rows, state, 0.5, kept, ~FINITE)[0] == 0
    assert torch.equal(weight, before[0])
    assert all(torch.equal(state[name], before[1][name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(kept.cast[:4], before[2][:4], strict=True))
