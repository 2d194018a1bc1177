"""The fused screen in emulation, against plain loops: whole numbers, whose sums are exact in any order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

LOWEST = torch.tensor(-3.0e38)
TYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float8_e4m3fn")}


def whole(generator, shape, most, dtype=torch.float32):
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def rows_apart(rows, gap):
    """`rows` with `gap` elements between them, which are NaN."""
    n, d = rows.shape
    room = torch.full((n, d + gap), math.nan).to(rows.dtype)
    room[:, :d] = rows
    return room[:, :d]


def keys_of(scores, n_members, keep, absolute, n_real):
    """Keys ``[rows, keep, n_buckets]`` of scores ``[rows, n_members · n_buckets]``."""
    n_buckets = scores.shape[1] // n_members
    bits = (scores.abs() if absolute else scores).view(torch.int32)
    latent = torch.arange(scores.shape[1], dtype=torch.int32)
    keys = ((bits & -(1 << (n_members - 1).bit_length())) | latent // n_buckets).view(torch.float32)
    keys = torch.where(latent < n_real, keys, LOWEST).view(-1, n_members, n_buckets)
    nothing = LOWEST.expand(len(scores), 3, n_buckets)
    return torch.cat([keys, nothing], dim=1).sort(dim=1, descending=True).values[:, :keep].contiguous()


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def run(emulated, dtype, x, x_scale, weight, weight_scale, bias, *, n_members, keep, n_real=None, absolute=False,
        cluster=1, slots=None):  # fmt: skip
    """The keys that the kernel writes."""
    experts = 1 if slots is None else len(slots[2])
    n_buckets = len(weight) // n_members // experts
    keys = torch.full((len(x), keep, n_buckets), math.nan)
    emulated.screen(
        dtype, address(x), x.stride(0), address(x_scale), address(weight), weight.stride(0), address(weight_scale),
        address(bias), "float32" if bias is None else str(bias.dtype).removeprefix("torch."), address(keys),
        rows=len(x), d=x.shape[1], n_real=n_buckets * n_members if n_real is None else n_real, n_buckets=n_buckets,
        n_members=n_members, keep=keep, absolute=absolute, cluster=cluster, stream=0,
        slots=None if slots is None else (*map(address, slots[:4]), slots[4], experts),
    )  # fmt: skip
    return keys


def check(emulated, dtype, rows, d, n_buckets, n_members, keep, *, scaled=False, bias=None, n_real=None, gap=0,
          absolute=False, cluster=1, seed=0):  # fmt: skip
    """One call against the loop; `bias` names its dtype."""
    generator = torch.Generator().manual_seed(seed)
    n = n_buckets * n_members
    n_real = n if n_real is None else n_real
    x = rows_apart(whole(generator, (rows, d), 4, TYPES[dtype]), gap)
    weight = whole(generator, (n, d), 4, TYPES[dtype])
    weight[n_real:] = 0
    weight = rows_apart(weight, 2 * gap)
    scores = x.double() @ weight.double().T + 0.0
    x_scale = weight_scale = offset = None
    if scaled:  # powers of two, so that nothing is rounded
        x_scale, weight_scale = (2.0 ** whole(generator, (size,), 3) for size in (rows, n_real))
        scores[:, :n_real] *= x_scale[:, None].double() * weight_scale.double()
    if bias is not None:
        offset = whole(generator, (n_real,), 20).to(getattr(torch, bias))
        offset[whole(generator, (n_real,), 8) == 8] = -math.inf
        scores[:, :n_real] += offset.double().clamp(min=LOWEST.double())
    scores = scores.float()
    found = run(emulated, dtype, x, x_scale, weight, weight_scale, offset, n_members=n_members, keep=keep,
                n_real=n_real, absolute=absolute, cluster=cluster)  # fmt: skip
    expected = keys_of(scores, n_members, keep, absolute, n_real)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keys_are_those_of_a_plain_loop(emulated, dtype, keep):
    check(emulated, dtype, rows=150, d=208, n_buckets=24, n_members=32, keep=keep)


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize(("rows", "n_buckets", "n_members"), [(1, 8, 16), (129, 40, 16), (300, 16, 48), (513, 8, 32)])
def test_tokens_and_tiles_of_any_number(emulated, rows, n_buckets, n_members, cluster):
    check(emulated, "float16", rows, 72, n_buckets, n_members, keep=3, scaled=True, cluster=cluster)


@pytest.mark.parametrize("d", [8, 64, 128, 136, 648, 1024])
def test_any_width(emulated, d):
    check(emulated, "float16", 40, d, 16, 48, keep=3)


@pytest.mark.parametrize("bias", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("absolute", [False, True])
def test_bias_scales_and_sizes(emulated, bias, absolute):
    check(emulated, "bfloat16", 70, 40, 16, 16, keep=3, scaled=True, bias=bias, absolute=absolute)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("n_buckets", "n_members", "n_real"), [(10, 20, 200), (13, 7, 85), (16, 32, 300), (9, 1, 9)])
def test_latents_that_do_not_exist(emulated, n_buckets, n_members, n_real, absolute):
    check(emulated, "float16", 33, 24, n_buckets, n_members, keep=3, bias="float32", n_real=n_real, absolute=absolute)


@pytest.mark.parametrize("gap", [8, 24])
def test_rows_apart(emulated, gap):
    check(emulated, "bfloat16", 20, 56, 16, 16, keep=2, gap=gap)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("cluster", [1, 2])
def test_any_interleaving(emulated, monkeypatch, order, cluster):
    monkeypatch.setenv("SPARSEKERN_EMULATOR_ORDER", str(order))
    check(emulated, "float8_e4m3fn", 300, 784, 16, 48, keep=3, scaled=True, bias="float32", cluster=cluster, seed=order)


@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from(sorted(TYPES)),
    rows=st.integers(1, 200),
    d=st.integers(1, 12).map(lambda eighths: 16 * eighths),
    n_buckets=st.integers(1, 36),
    n_members=st.integers(1, 36),
    keep=st.integers(1, 3),
    cluster=st.sampled_from([1, 2, 4]),
    missing=st.integers(0, 5),
    scaled=st.booleans(),
    bias=st.sampled_from([None, "float32"]),
    absolute=st.booleans(),
)
def test_any_shape(emulated, dtype, rows, d, n_buckets, n_members, keep, cluster, missing, scaled, bias, absolute):
    n_real = max(1, n_buckets * n_members - missing)
    check(emulated, dtype, rows, d, n_buckets, n_members, keep, scaled=scaled, bias=bias, n_real=n_real,
          absolute=absolute, cluster=cluster)  # fmt: skip


def tiles(offsets, n_slots, height):
    """First tile of every expert, and expert of every tile, of `height` slots."""
    counts = (offsets.diff() + height - 1) // height
    ends = counts.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(-(-n_slots // height) + len(counts), dtype=torch.int32)
    return ends - counts, torch.searchsorted(ends, numbers, right=True, out_int32=True)


@pytest.mark.parametrize(
    ("loads", "n_active"),
    [([5, 0, 131, 0, 64], 1), ([0, 0, 40], 1), ([256, 128], 2), ([1, 30, 30, 1], 2)],
    ids=["uneven", "one-has-all", "whole-tiles", "small"],
)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_slots_meet_the_latents_of_their_expert(emulated, loads, n_active, dtype, cluster):
    generator = torch.Generator().manual_seed(3)
    d, n_buckets, n_members, keep = 80, 20, 16, 3
    n_slots, n_experts, latents = sum(loads), len(loads), n_buckets * n_members
    x = rows_apart(whole(generator, (n_slots // n_active, d), 4, TYPES[dtype]), 16)
    weight = whole(generator, (n_experts * latents, d), 4, TYPES[dtype])
    x_scale, weight_scale = (2.0 ** whole(generator, (size,), 3) for size in (len(x), len(weight)))
    bias = whole(generator, (len(weight),), 20)
    order = torch.randperm(n_slots, generator=generator).int()
    offsets = torch.tensor([0, *loads]).cumsum(0).int()
    expert = torch.arange(n_experts).repeat_interleave(torch.tensor(loads))

    gathered = torch.full((n_slots, d), math.nan).to(x.dtype)
    emulated.gather_rows(address(x), 2 * x.stride(0), address(order), n_active, address(gathered), n_slots, 2 * d, 0)
    assert torch.equal(gathered, x[order // n_active])

    scores = x.double() @ weight.double().T * (x_scale[:, None].double() * weight_scale.double()) + bias.double()
    expected = torch.full((n_slots, keep, n_buckets), math.nan)
    for place, slot in enumerate(order.tolist()):
        mine = scores[slot // n_active, expert[place] * latents :][:latents]
        expected[slot] = keys_of(mine[None].float(), n_members, keep, False, latents)[0]
    found = run(emulated, dtype, gathered, x_scale, weight, weight_scale, bias, n_members=n_members, keep=keep,
                cluster=cluster, slots=(order, offsets, *tiles(offsets, n_slots, 128 * cluster), n_active))  # fmt: skip
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=200, deadline=None)
@given(token_tiles=st.integers(1, 40), bucket_tiles=st.integers(1, 40), group=st.integers(1, 40))
def test_every_tile_has_its_turn_once(emulated, token_tiles, bucket_tiles, group):
    units = range(token_tiles * bucket_tiles)
    found = [emulated.screen_tile_of(unit, token_tiles, bucket_tiles, group) for unit in units]
    assert sorted(found) == [(t, b) for t in range(token_tiles) for b in range(bucket_tiles)]
    for unit, (tokens, _) in enumerate(found):
        assert tokens // group == unit // (group * bucket_tiles)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"keep": 4}, "keep"),
        ({"cluster": 3}, "cluster"),
        ({"d_gap": 4}, "16 bytes"),
        ({"dtype": "float32"}, "operands"),
        ({"n_real": 300}, "n_real"),
    ],
)
def test_refuses_what_it_does_not_serve(emulated, changed, said):
    options = {"dtype": "float16", "n_members": 16, "keep": 3, "cluster": 1, "n_real": None, "d_gap": 0, **changed}
    rows = torch.zeros(16 * 16, 16 + options.pop("d_gap"), dtype=torch.float16)
    with pytest.raises(ValueError, match=said):
        run(emulated, options.pop("dtype"), rows[:4, :16], None, rows[:, :16], None, None, **options)
