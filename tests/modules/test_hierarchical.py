"""HierarchicalSAE: its loss and every gradient against a dense definition, the hierarchy, and PyTorch's habits."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk

LEVELS = [
    ([(10, 3)], None),
    ([(8, 3), (5, 2)], None),
    ([(4, 2), (3, 2), (2, 1)], None),
    ([(8, 3), (6, 1)], 4),
    ([(8, 2), (6, 3)], 2),
]


def make(levels=((8, 3), (5, 2)), d_in=12, seed=1, **options):
    return sk.HierarchicalSAE(d_in, levels, generator=torch.Generator().manual_seed(seed), **options)


def perturbed(sae, scale=0.3):
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return sae


def dense_parts(sae, x):
    """The parts of the loss, written out with dense tensors: the definition."""

    def fvu(residual):
        return residual.square().sum() / (x - x.mean(0)).square().sum()

    W_enc, W_dec = sae.W_enc, sae.W_dec
    pre = (x - sae.b_dec) @ W_enc.T + sae.b_enc
    codes = []
    for level, (children, k) in enumerate(sae.levels):
        own = pre[:, sae.firsts[level] : sae.firsts[level + 1]]
        families = own.reshape(len(x), -1, children)
        order = families.sort(dim=2, descending=True, stable=True).indices[..., :k]
        kept = torch.zeros_like(families).scatter(2, order, 1.0) * (families >= sae.threshold)
        if level:
            kept = kept * (codes[-1] > 0).unsqueeze(2)
        codes.append((families * kept).relu().flatten(1))
    z = torch.cat(codes, 1)
    parts = {"reconstruction": fvu(x - z @ W_dec - sae.b_dec)}
    if len(sae.levels) > 1:
        upper = sae.firsts[-2]
        parts["top"] = sae.top_coefficient * fvu(x - z[:, :upper] @ W_dec[:upper] - sae.b_dec)
    parts["l1"] = sae.l1_coefficient * z.sum(1).mean() / (x - x.mean(0)).norm(dim=1).mean()
    if sae.orthogonality_coefficient:
        top = sae.levels[0][0]
        rows = [torch.nn.functional.normalize(weight[:top], dim=1) for weight in (W_dec, W_enc)]
        off = rows[0] @ rows[1].T * (1 - torch.eye(top, dtype=x.dtype))
        parts["orthogonality"] = sae.orthogonality_coefficient * off.square().sum() / (top * top - top)
    return parts, z


@given(st.sampled_from(LEVELS), st.integers(0, 2**31), st.integers(2, 20), st.booleans())
def test_loss_and_every_gradient_equal_the_dense_definition(shape, seed, rows, threshold):
    levels, subspace_dim = shape
    torch.manual_seed(seed)
    sae = make(
        levels,
        subspace_dim=subspace_dim,
        threshold=0.4 if threshold else None,
        orthogonality_coefficient=0.1,
        dtype=torch.float64,
    )
    perturbed(sae)
    x = torch.randn(rows, 12, dtype=torch.float64)
    (expected, z), out = dense_parts(sae, x), sae.loss(x)
    torch.testing.assert_close(out.codes.to_dense(), z)
    assert out.parts.keys() == expected.keys()
    for name, part in expected.items():
        torch.testing.assert_close(out.parts[name], part)
    parameters = list(sae.parameters())
    mine = torch.autograd.grad(out.total, parameters, materialize_grads=True)
    theirs = torch.autograd.grad(sum(expected.values()), parameters, materialize_grads=True)
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("levels", "subspace_dim"), LEVELS)
def test_children_fire_only_where_their_parent_does(levels, subspace_dim):
    sae = perturbed(make(levels, subspace_dim=subspace_dim))
    codes = sae.encode(torch.randn(50, 12))
    assert codes.k == sum(sae.slots())
    active = codes.to_dense() > 0
    for latent in range(sae.d_sae):
        parent = sae.parent_of(latent)
        if parent is None:
            assert latent < sae.firsts[1]
        else:
            assert latent in sae.children_of(parent)
            assert (active[:, parent] | ~active[:, latent]).all()
    for parent in range(sae.firsts[-2]):
        family = active[:, list(sae.children_of(parent))] if len(sae.children_of(parent)) else active[:, :0]
        k = sae.levels[sae.level_of(parent) + 1][1] if sae.level_of(parent) + 1 < len(levels) else 0
        assert (family.sum(1) <= k).all()


def test_the_tree_can_be_read():
    sae = make([(4, 2), (3, 2), (2, 1)])
    assert sae.d_sae == 4 + 12 + 24
    assert [sae.level_of(latent) for latent in (0, 3, 4, 15, 16, 39)] == [0, 0, 1, 1, 2, 2]
    assert list(sae.children_of(1)) == [7, 8, 9]
    assert list(sae.children_of(8)) == [24, 25]
    assert sae.parent_of(25) == 8
    assert list(sae.children_of(25)) == []
    density = torch.arange(40) / 100
    tree = sae.tree(1, density, least=0.08)
    assert [child.latent for child in tree.children] == [9, 8]
    assert str(tree).splitlines() == [
        "1  1%",
        "  9  9%",
        "    27  27%",
        "    26  26%",
        "  8  8%",
        "    25  25%",
        "    24  24%",
    ]
    with pytest.raises(ValueError, match=r"latent must lie in \[0, 40\), got 40"):
        sae.level_of(40)


@pytest.mark.parametrize(("levels", "subspace_dim"), [([(64, 4), (40, 2)], None), ([(64, 4), (16, 1)], 4)])
def test_training_on_kernels_equals_training_on_the_reference(levels, subspace_dim, monkeypatch):
    x = torch.randn(6, 64, 12)
    losses = []
    for backend in ("reference", None):
        if backend:
            monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
        else:
            monkeypatch.delenv("SPARSEKERN_BACKEND")
        trainer = sk.Trainer(make(levels, subspace_dim=subspace_dim), lr=1e-2, warmup_steps=0)
        losses.append(torch.stack([trainer.step(batch).loss for batch in x]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("subspace_dim", [None, 3])
def test_unit_rows_saving_copying_pickling_and_resuming(tmp_path, subspace_dim):
    x = torch.randn(6, 32, 12)
    sae = make(subspace_dim=subspace_dim)
    trainer = sk.Trainer(sae, lr=1e-2)
    for batch in x[:3]:
        trainer.step(batch)
    for weight in sae.unit_weights():
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
    sae.save_pretrained(tmp_path)
    loaded = sk.SAE.from_pretrained(tmp_path)
    assert isinstance(loaded, sk.HierarchicalSAE)
    for other in (loaded, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert other.config() == sae.config()
        assert torch.equal(other(x[0]), sae(x[0]))
    resumed = sk.Trainer(make(subspace_dim=subspace_dim, seed=2), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for batch in x[3:]:
        assert torch.equal(trainer.step(batch).loss, resumed.step(batch).loss)


@pytest.mark.parametrize("subspace_dim", [None, 4])
def test_no_dense_gradient_is_made(subspace_dim):
    """The trainer keeps the gradients of all row weights as factors, where the kernels serve."""
    sae = make([(64, 4), (16, 1)], subspace_dim=subspace_dim, orthogonality_coefficient=0.0)
    trainer = sk.Trainer(sae, lr=1e-2)
    trainer.step(torch.randn(32, 12))
    if trainer.optimizer._factored()[1]:
        assert all(weight.grad is None for weight in sae.latent_weights())
    sae.encode(torch.randn(2, 3, 12)).values.sum().backward()
    assert sae(torch.randn(2, 3, 12)).shape == (2, 3, 12)


def test_codes_of_another_layout_are_refused():
    sae = make()
    codes = sae.encode(torch.randn(4, 12))
    longer = (torch.cat([tensor, tensor[:, -1:]], 1) for tensor in codes[:2])
    codes = sk.SparseCodes(*longer, sae.d_sae)
    with pytest.raises(ValueError, match="codes must have 9 slots, as encode makes them, got 10"):
        sae.decode(codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "levels must hold at least one pair"),
        ({"levels": [(4, 5)]}, r"levels must be pairs \(latents, kept\) with 1 ≤ kept ≤ latents, got \(4, 5\)"),
        ({"levels": [(4, 2, 1)]}, "levels must be pairs"),
        ({"levels": [(4, 2)], "subspace_dim": 3}, "levels must be two with subspace_dim, got 1"),
        ({"subspace_dim": 0}, "subspace_dim must be a whole number of at least 1"),
        ({"top_coefficient": -0.1}, "top_coefficient must not be negative"),
        ({"screen": "fp4"}, "screen must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)
