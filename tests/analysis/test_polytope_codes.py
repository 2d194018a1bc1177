"""Codes of units that are on, against definitions written out; five seeds stand beside bounds."""

import math
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import max_pool2d

from sparsekern.analysis import polytope
from sparsekern.analysis.polytope import PolytopeCodes, hamming, jaccard, neighbors, polytope_codes, surrogate_agreement
from sparsekern.bits import pack_bits

transformers = pytest.importorskip("transformers")

SEEDS = range(5)
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mlp(*widths, act=nn.ReLU, seed=0, **options):
    torch.manual_seed(seed)
    layers = [m for one, two in pairwise(widths) for m in (nn.Linear(one, two), act(**options))]
    return nn.Sequential(*layers)


def packed(flags):
    """Codes of one layer of the given bits."""
    flags = torch.as_tensor(flags, dtype=torch.bool)
    return PolytopeCodes(pack_bits(flags), (("layer", flags.shape[1]),), "sign")


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.two(self.one(x).relu())


class Residual(nn.Module):
    """One activation module for both halves, as in a ResNet's block."""

    def __init__(self, inplace=False):
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU(inplace)

    def forward(self, x):
        return self.relu(x + self.two(self.relu(self.one(x))))


# What the codes are


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=2, max_size=4), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_signs_are_those_of_the_pre_activations(widths, n, batch_size, inplace):
    net, x = mlp(*widths, inplace=inplace), torch.randn(n, widths[0])
    codes = polytope_codes(net, x, batch_size=batch_size)
    expected, h = [], x
    for linear in net[::2]:
        expected.append(linear(h) > 0)
        h = linear(h).relu()
    assert torch.equal(codes.unpack(), torch.cat(expected, 1))
    assert codes.layers == tuple((str(2 * i + 1), width) for i, width in enumerate(widths[1:]))
    assert codes.data.shape == (n, -(-codes.n_units // 8))
    for (name, _), flags in zip(codes.layers, expected, strict=True):
        assert torch.equal(codes.unpack(layer=name), flags)
        assert torch.equal(codes.layer(name).unpack(), flags)
    rows = torch.arange(n).flip(0)
    assert torch.equal(codes.unpack(rows), codes.unpack()[rows])
    by_output = polytope_codes(net, x, [str(2 * i) for i in range(len(widths) - 1)])
    assert torch.equal(by_output.data, codes.data)


def test_the_derivative_of_a_relu_is_its_sign_and_of_others_their_own():
    x = torch.randn(50, 6)
    for act in (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.ELU):
        net = mlp(6, 30, 8, act=act)
        soft = polytope_codes(net, x, kind="soft")
        u = net[0](x).detach().double().requires_grad_()
        (slope,) = torch.autograd.grad(net[1].double()(u).sum(), u)
        assert soft.data.dtype == torch.float16
        torch.testing.assert_close(soft.unpack(layer="1"), slope.clamp(0, 1).float(), atol=5e-4, rtol=0)
        net.float()
        if act is nn.ReLU:
            assert torch.equal(soft.unpack(), polytope_codes(net, x).unpack().float())
    assert next(net.parameters()).grad is None


def test_a_module_that_is_called_twice_has_a_layer_for_each_call():
    for inplace in (False, True):
        torch.manual_seed(0)
        net, x = Residual(inplace), torch.randn(9, 5)
        codes = polytope_codes(net, x)
        first = net.one(x)
        assert codes.layers == (("relu", 5), ("relu#2", 5))
        assert torch.equal(codes.unpack(layer="relu"), first > 0)
        assert torch.equal(codes.unpack(layer="relu#2"), x + net.two(first.relu()) > 0)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(2, 1, dilation=2)])
def test_a_max_pool_adds_which_entry_is_the_largest(pool):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), pool)
    x = torch.randn(4, 2, 9, 8)
    codes = polytope_codes(net, x, ["1", "2"])
    hidden = net[0](x)
    assert torch.equal(codes.unpack(layer="1"), (hidden > 0).flatten(1))
    pooled, flat = max_pool2d(hidden.relu(), pool.kernel_size, pool.stride, pool.padding, pool.dilation, False, True)
    size = pool.kernel_size**2
    bits = codes.unpack(layer="2").view(*pooled.shape, size)
    assert (bits.sum(-1) == 1).all()
    place = bits.long().argmax(-1)
    row = torch.arange(pooled.shape[2])[:, None] * pool.stride - pool.padding
    column = torch.arange(pooled.shape[3]) * pool.stride - pool.padding
    row = row + place // pool.kernel_size * pool.dilation
    column = column + place % pool.kernel_size * pool.dilation
    positive = pooled > 0  # else the first of equal zeros, which may be beyond the border for one and not the other
    assert positive.float().mean() > 0.5
    assert torch.equal((row * hidden.shape[3] + column)[positive], flat[positive])


def test_batch_norm_is_that_of_evaluation_and_the_mode_is_left():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.ReLU())
    x = torch.randn(10, 4)
    one = polytope_codes(net, x, batch_size=3)
    assert net.training
    assert torch.equal(one.data, polytope_codes(net.eval(), x).data)
    assert not net[1]._forward_hooks
    assert not net[2]._forward_pre_hooks


# Tokens


def test_tokens_have_a_row_each_where_the_mask_says():
    torch.manual_seed(0)
    net = transformers.ArceeForCausalLM(transformers.ArceeConfig(hidden_act="relu", **SMALL)).eval()
    ids = torch.randint(0, 50, (5, 7))
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    seen = []
    with torch.no_grad():
        hook = net.model.layers[1].mlp.up_proj.register_forward_hook(lambda *call: seen.append(call[2]))
        net(input_ids=ids, attention_mask=mask)
        hook.remove()
    codes = polytope_codes(net, {"input_ids": ids, "attention_mask": mask}, batch_size=2)
    name = "model.layers.1.mlp.act_fn"
    assert codes.layers == (("model.layers.0.mlp.act_fn", 21), (name, 21))
    assert torch.equal(codes.unpack(layer=name), seen[0][mask.bool()] > 0)
    assert len(polytope_codes(net, ids)) == 35
    last = torch.zeros(5, 7, dtype=torch.bool)
    last[:, -1] = True
    whole = polytope_codes(net, ids).unpack()
    for where in (last, lambda batch: last[: len(batch)]):
        assert torch.equal(polytope_codes(net, ids, where=where, batch_size=5).unpack(), whole[6::7])
    batches = [{"input_ids": ids[:2, :3]}, {"input_ids": ids[2:]}]  # of other lengths
    assert len(polytope_codes(net, iter(batches))) == 6 + 21
    with pytest.raises(ValueError, match="where must be bool"):
        polytope_codes(net, ids, where=torch.ones(5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="where must be a callable"):
        polytope_codes(net, batches, where=last)


def test_gates_have_two_signs_a_unit():
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    ids = torch.randint(0, 50, (3, 4))
    codes = polytope_codes(net, ids, kind="gate")
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up")]
    assert codes.layers == tuple((name, 21) for name in names)
    assert codes.kind == "gate"
    assert torch.equal(codes.data[:, :0], polytope_codes(net, ids, names).data[:, :0])
    assert torch.equal(codes.unpack(), polytope_codes(net, ids, names).unpack())
    assert torch.equal(codes.unpack(layer=names[0]), polytope_codes(net, ids).unpack(layer=names[0][:-9] + "act_fn"))
    assert polytope_codes(net, ids, [tuple(names[2:])], "gate").layers == codes.layers[2:]
    with pytest.raises(ValueError, match="pairs of names"):
        polytope_codes(net, ids, names, "gate")
    with pytest.raises(ValueError, match="no siblings gate_proj"):
        polytope_codes(mlp(3, 4), torch.randn(2, 3), kind="gate")


# Files


@pytest.mark.parametrize("kind", ["sign", "soft"])
def test_codes_that_go_to_disk_are_those_in_memory(kind, tmp_path):
    net, x = mlp(6, 11, 5, act=nn.GELU), torch.randn(40, 6)
    codes = polytope_codes(net, x, kind=kind)
    streamed = polytope_codes(net, x.split(7), kind=kind, output=tmp_path / "one")
    codes.save(tmp_path / "two")
    for found in (
        streamed,
        PolytopeCodes.load(tmp_path / "two"),
        PolytopeCodes.load(tmp_path / "two", mmap=False),
        polytope_codes(net, x, kind=kind, output=tmp_path / "two"),
    ):
        assert torch.equal(found.data, codes.data)
        assert (found.layers, found.kind) == (codes.layers, codes.kind)
    assert np.load(tmp_path / "one" / "codes.npy").shape == codes.data.shape
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["codes.npy", "manifest.json"]
    streamed.save(tmp_path / "one")  # over the file that it is mapped to
    assert torch.equal(PolytopeCodes.load(tmp_path / "one").data, codes.data)
    PolytopeCodes(codes.data[:0], codes.layers, kind).save(tmp_path / "none")
    assert len(PolytopeCodes.load(tmp_path / "none")) == 0


def test_an_interruption_leaves_the_codes_that_were_there(tmp_path):
    net, x = mlp(6, 11), torch.randn(20, 6)
    before = polytope_codes(net, x, output=tmp_path).data.clone()

    def broken():
        yield x[:5]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        polytope_codes(net, broken(), output=tmp_path)
    assert torch.equal(PolytopeCodes.load(tmp_path).data, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.npy", "manifest.json"]
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="polytope codes of version 1"):
        PolytopeCodes.load(tmp_path)
    with pytest.raises(ValueError, match="has no manifest"):
        PolytopeCodes.load(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from Linux")
def test_streaming_keeps_memory_bounded(tmp_path):
    # 80,000 samples of 2,048 units: 20 MiB as bits, 156 MiB as flags.
    x = torch.randn(1000, 2048)
    used = []

    def batches():
        for _ in range(80):
            used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
            yield x

    codes = polytope_codes(nn.Sequential(nn.Identity(), nn.ReLU()), batches(), output=tmp_path)
    assert codes.data.shape == (80_000, 256)
    # From the 16th batch on, since the first ones grow the heap; 0 to 4 MiB in five runs, 16 where the bits are kept.
    assert max(used[16:]) - used[16] < 10
    assert (tmp_path / "codes.npy").stat().st_size == 128 + 80_000 * 256


# Distances


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(2, 20), st.integers(1, 12), st.integers(0, 2**31))
def test_distances_are_those_of_the_flags(n, rows, others, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(size, n, generator=generator) < 0.4 for size in (rows, others))
    differ = (a[:, None] ^ b).sum(2)
    either = (a[:, None] | b).sum(2)
    assert torch.equal(hamming(packed(a), packed(b)).long(), differ)
    torch.testing.assert_close(jaccard(packed(a), packed(b)), differ / either.clamp(min=1), atol=1e-6, rtol=0)
    k = min(3, others)
    found = neighbors(packed(a), packed(b), k)
    assert torch.equal(found.distances.long(), differ.sort(1).values[:, :k])
    assert torch.equal(differ.gather(1, found.indices.long()), found.distances.long())
    alone = neighbors(packed(a), k=1, metric="jaccard")
    assert (alone.indices.squeeze(1) != torch.arange(rows)).all()


def test_distances_need_bits_of_the_same_layers():
    net, x = mlp(4, 9, act=nn.GELU), torch.randn(5, 4)
    soft, sign = polytope_codes(net, x, kind="soft"), polytope_codes(net, x)
    with pytest.raises(ValueError, match="a must be codes of kind"):
        hamming(soft)
    with pytest.raises(ValueError, match="b must have the layers"):
        jaccard(sign, packed(torch.zeros(3, 9)))


@pytest.mark.parametrize("degrees", [20, 60, 90, 135, 170])
def test_random_units_differ_in_proportion_to_the_angle(degrees):
    # A hyperplane through 0 parts two directions with probability θ / π. 4,096 units, largest deviation of eight
    # seeds: 0.0095; four standard deviations of the binomial are 0.031 at 90°.
    for seed in SEEDS:
        net = mlp(32, 4096, seed=seed)
        nn.init.zeros_(net[0].bias)
        nn.init.normal_(net[0].weight)
        plane = torch.linalg.qr(torch.randn(32, 2))[0].T
        angle = math.radians(degrees)
        ends = torch.stack([plane[0], math.cos(angle) * plane[0] + math.sin(angle) * plane[1]])
        share = hamming(polytope_codes(net, ends))[0, 1].item() / 4096
        assert share == pytest.approx(degrees / 180, abs=0.02)


# Surrogates


def test_surrogates_agree_and_permuted_units_do_not():
    # Five seeds: correlation 0.80 to 0.90 (0.86 to 0.97 with weights five times as large), null within 0.06 of 0.
    for seed in SEEDS:
        torch.manual_seed(seed)
        x = torch.randn(400, 8)
        found = {}
        for scale in (1, 5):
            net = mlp(8, 40, 40, act=nn.GELU, seed=seed)
            with torch.no_grad():
                for linear in net[::2]:
                    linear.weight *= 3 * scale
            found[scale] = surrogate_agreement(net, x, n_null=19)
            assert found[scale].layers == ("1", "3")
            for name in found[scale].layers:
                agreement, correlation = (found[scale].results[f"{key} {name}"] for key in ("agreement", "correlation"))
                assert agreement.value > 0.998  # 1 but for the rounding to float16
                assert correlation.value > 0.75
                assert (correlation.null.abs() < 0.3).all()
                assert agreement.p == correlation.p == 0.05
        for name in ("1", "3"):
            assert found[5].results[f"graded {name}"].value < found[1].results[f"graded {name}"].value
    assert len(found[5].to_frame()) == 4


def test_a_relu_s_surrogates_are_the_same():
    found = surrogate_agreement(mlp(8, 40), torch.randn(100, 8), n_null=3)
    assert found.results["agreement 1"].value == 1
    assert found.results["correlation 1"].value == pytest.approx(1)
    assert found.results["graded 1"].value == 0


def test_units_that_are_always_on_have_no_correlation():
    net = mlp(3, 4)
    nn.init.constant_(net[0].bias, 100)
    assert math.isnan(surrogate_agreement(net, torch.randn(10, 3), n_null=2).results["correlation 1"].value)


# Wrong input


def test_wrong_input_is_named():
    net, x = mlp(4, 6), torch.randn(5, 4)
    net.extra = nn.ReLU()
    bad = {
        "kind must be one of": {"kind": "hard"},
        "batch_size must be at least 1": {"batch_size": 0},
        "is not a module of": {"layers": ["7"]},
        "layers must name each module once": {"layers": ["1", "1"]},
        "layers must be a sequence": {"layers": "1"},
        "extra": {"layers": ["1", "extra"]},
        "activation modules for kind 'soft'": {"layers": ["0"], "kind": "soft"},
    }
    net.forward = lambda given: net[1](net[0](given))
    for message, options in bad.items():
        with pytest.raises(ValueError, match=message):
            polytope_codes(net, x, **options)
    assert polytope_codes(net, x).layers == (("1", 6),)  # a module that is not called is no layer
    with pytest.raises(ValueError, match="a sample at least"):
        polytope_codes(net, x[:0])
    with pytest.raises(ValueError, match="finite pre-activations: those of layer '1'"):
        polytope_codes(net, x * torch.nan)
    with pytest.raises(ValueError, match="batches that are tensors"):
        polytope_codes(net, [[x, x]])
    with pytest.raises(ValueError, match="tensors of one length"):
        polytope_codes(net, {"input": x, "other": x[:2]})
    with pytest.raises(ValueError, match="name the linear layers"):
        polytope_codes(Functional(), x)
    assert polytope_codes(Functional(), x, ["one"]).layers == (("one", 6),)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="the same layers and units"):
        polytope_codes(conv, [torch.randn(1, 1, 5, 5), torch.randn(1, 1, 6, 5)])


def test_codes_check_what_they_are_made_of():
    data = torch.zeros(3, 2, dtype=torch.uint8)
    codes = PolytopeCodes(data, (("one", 9), ("two", 4)), "sign")
    assert "3 rows, 13 units of 2 layers" in repr(codes)
    with pytest.raises(ValueError, match="layer must be one of one, two"):
        codes.unpack(layer="three")
    with pytest.raises(ValueError, match="data must be"):
        PolytopeCodes(data, (("one", 8),), "sign")
    with pytest.raises(ValueError, match="data must be"):
        PolytopeCodes(data, (("one", 2),), "soft")
    with pytest.raises(ValueError, match="kind must be"):
        PolytopeCodes(data, (("one", 9),), "bits")
    with pytest.raises(ValueError, match="ceil_mode"):
        polytope_codes(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), torch.randn(1, 1, 5, 5), ["0"])
    with pytest.raises(ValueError, match="n_null"):
        surrogate_agreement(mlp(2, 3), torch.randn(2, 2), n_null=-1)
    with pytest.raises(ValueError, match="tensor or a mapping"):
        surrogate_agreement(mlp(2, 3), iter([torch.randn(2, 2)]))


def test_all_names_are_there():
    assert all(hasattr(polytope, name) for name in polytope.__all__)
