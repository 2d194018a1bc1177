"""Streaming row-wise top-k, in the emulator of CUDA."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.backends.cuda import _library
from sparsekern.backends.cuda.selection import row_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOM = 4864  # candidates in shared memory
INFINITY = math.inf


@pytest.fixture(scope="module", autouse=True)
def kernels(emulated):
    with _library.emulating(emulated):
        yield emulated


def expect(keys, k, **options):
    """Runs the kernel, compares with a stable sort, and returns how often it read each row."""
    passes = torch.zeros(len(keys), dtype=torch.int32)
    values, indices = row_topk(keys, k, passes=passes, **options)
    expected = keys.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(indices, expected.indices[:, :k].int(), rtol=0, atol=0)
    torch.testing.assert_close(values, expected.values[:, :k], rtol=0, atol=0, equal_nan=True)
    assert (passes >= 1).all()
    return passes.tolist()


def plan_of(kernels, keys, k, **changes):
    plan = kernels.row_topk_plan(*keys.shape, k, keys.element_size())
    for name, value in changes.items():
        setattr(plan, name, value)
    return plan


def sampled(kernels, keys, plan):
    """Indices of the sample of rows that begin at a multiple of 16 bytes."""
    assert keys.data_ptr() % 16 == 0
    in_pack = 16 // keys.element_size()
    packs = kernels.row_topk_sample(plan.sample // 4, keys.shape[1] // in_pack)
    return (torch.tensor(packs)[:, None] * in_pack + torch.arange(4) * (in_pack // 4)).flatten()


SPECIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0009765625, 6e-8, -6e-8, 1e-45, -1e-45, INFINITY, -INFINITY, math.nan, -math.nan]
)
NUMBERS = st.one_of(
    st.floats(width=16),
    st.sampled_from([0.0, -0.0]),
    st.integers(-3, 3).map(float),
    st.floats(-1, 1, width=32),
)


@st.composite
def matrices(draw):
    """Rows at odd places and distances, of a few values that come back again and again."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, n = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 40), st.integers(1, 900)))
    pool = torch.tensor(draw(st.lists(st.one_of(SPECIAL, NUMBERS), min_size=1, max_size=30)))
    offset, gap = draw(st.integers(0, 8)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    memory = pool[torch.randint(len(pool), (offset + rows * (n + gap),), generator=generator)].to(dtype)
    keys = memory.as_strided((rows, n), (n + gap, 1), offset)
    return keys, draw(st.integers(1, n))


@given(matrices(), st.data())
def test_equals_a_stable_sort_by_any_plan(kernels, matrix, data):
    keys, k = matrix
    changes = {}
    if keys.shape[1] >= 135:  # there are 16 packs of 16 bytes, as many as a sample of 64 keys wants
        parts = data.draw(st.integers(1, 3), "parts")
        sample = data.draw(st.sampled_from([0, 16, 64]), "sample")
        changes = {
            "sample": sample,
            "rank": data.draw(st.integers(1, max(sample, 1)), "rank of the bound"),
            "parts": parts,
            "list": data.draw(st.sampled_from([2, 64, 1024] if parts > 1 else [0, 2, 64, 1024]), "list"),
            "rows_at_once": data.draw(st.integers(1, 3), "rows at once"),
        }
    expect(keys, k, plan=plan_of(kernels, keys, k, **changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 64, 1000])
def test_random_rows_are_read_once(kernels, dtype, k):
    keys = torch.randn(3, 12_345).to(dtype)
    assert plan_of(kernels, keys, k).sample
    assert expect(keys, k) == [1, 1, 1]


HARD = {
    "all equal": lambda n: torch.zeros(n),
    "two values": lambda n: torch.randint(2, (n,)).float(),
    "few above many": lambda n: torch.zeros(n).index_fill(0, torch.randint(n, (5,)), 1.0),
    "half of it negative zero": lambda n: torch.randint(2, (n,)).float() * torch.tensor(-0.0),
    "all but a few excluded": lambda n: torch.full((n,), -INFINITY).index_fill(0, torch.randint(n, (99,)), -2.0),
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "a block of large ones": lambda n: torch.randn(n).index_add(0, torch.arange(4000, 5500), torch.full((1500,), 9.0)),
    "denormal": lambda n: torch.randint(-50, 50, (n,)).float() * 2**-149,
    "all infinite": lambda n: torch.full((n,), INFINITY),
    "a few NaN": lambda n: torch.randn(n).index_fill(0, torch.randint(n, (20,)), -math.nan),
    "all NaN": lambda n: torch.full((n,), math.nan),
    "NaN late": lambda n: torch.randn(n).index_fill(0, torch.arange(n - 6000, n), math.nan),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_rows_are_read_once_too(kernels, name, dtype):
    """Ties are ordered by index, so that for the sample no two keys are equal."""
    assert expect(HARD[name](9001)[None].to(dtype), 64) == [1]


@pytest.mark.parametrize("k", [1, 32, 1024])
def test_no_length_is_misread_where_the_largest_lie_side_by_side(kernels, k):
    """The places of the sample depend on the length alone."""
    for n in range(ROOM + 1, 9000, 379):
        assert expect(torch.zeros(1, n), k) == [1]
        assert expect(torch.arange(n).half()[None], k) == [1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_few_candidates(kernels, dtype):
    keys, k = torch.randn(1, 9000).to(dtype), 600
    plan = plan_of(kernels, keys, k)
    assert plan.rank < k - 50  # so many can be in the sample and yet be too few
    keys[0, sampled(kernels, keys, plan)[: plan.rank + 20]] += 50
    (passes,) = expect(keys, k)
    assert passes > 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", ["different", "equal", "NaN"])
def test_too_many_candidates(kernels, dtype, rest):
    keys = torch.randn(1, 9000)
    keys = {"different": keys, "equal": torch.ones_like(keys), "NaN": torch.full_like(keys, math.nan)}[rest].to(dtype)
    keys[0, sampled(kernels, keys, plan_of(kernels, keys, 64))] = -50.0
    (passes,) = expect(keys, 64)
    assert passes > 2


def test_a_row_is_read_again_alone(kernels):
    keys = torch.randn(3, 9000)
    keys[1, sampled(kernels, keys, plan_of(kernels, keys, 64))] = -50.0
    first, second, third = expect(keys, 64)
    assert (first, third) == (1, 1)
    assert second > 1


@pytest.mark.parametrize("n", [ROOM - 1, ROOM, ROOM + 1])
@pytest.mark.parametrize("k", [1, 1024])
def test_around_the_room_in_shared_memory(kernels, n, k):
    keys = torch.randn(1, n)
    expect(keys, k)
    expect(keys, k, plan=plan_of(kernels, keys, k, sample=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "rising", "all equal"])
def test_several_blocks_a_row(kernels, dtype, kind):
    n = 70_001
    keys = (torch.randn(n) if kind == "random" else HARD[kind](n)).to(dtype)[None]
    plan = plan_of(kernels, keys, 32)
    assert plan.parts > 1
    assert plan.list > 0
    assert expect(keys, 32) == [1]


def test_more_listed_candidates_than_shared_memory_has_room_for(kernels):
    keys = torch.randn(2, 12_000)
    plan = plan_of(kernels, keys, 1000, sample=256, rank=160, parts=2, list=12_000)
    assert expect(keys, 1000, plan=plan) == [1, 1]


def test_lists_that_overflow(kernels):
    keys = torch.randn(2, 12_000)
    plan = plan_of(kernels, keys, 1000, sample=256, rank=160, parts=3, list=2_000, rows_at_once=1)
    assert min(expect(keys, 1000, plan=plan)) > 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_of_threads_matters(kernels, monkeypatch, seed):
    monkeypatch.setenv("SPARSEKERN_EMULATOR_ORDER", str(seed))
    keys = torch.randint(-500, 500, (2, 6000)).float()
    expect(keys, 100, plan=plan_of(kernels, keys, 100, sample=256, rank=20, parts=2, list=4096))
    expect(keys, 100)


def test_no_rows(kernels):
    values, indices = row_topk(torch.empty(0, 50), 3)
    assert values.shape == indices.shape == (0, 3)


def test_columns_apart(kernels):
    expect(torch.randn(50, 4).T, 7)
    expect(torch.randn(9, 1).expand(9, 1), 1)
    expect(torch.randn(1, 60).expand(3, 60), 7)


@pytest.mark.parametrize(
    ("keys", "k", "message"),
    [
        (torch.zeros(4), 1, "keys must be"),
        (torch.zeros(2, 4, dtype=torch.float64), 1, "keys must be"),
        (torch.zeros(2, 4), 0, "k must be from 1 to the 4"),
        (torch.zeros(2, 4), 5, "k must be from 1 to the 4"),
        (torch.zeros(2, 2000), 1025, "at most 1024"),
    ],
)
def test_what_it_does_not_serve(kernels, keys, k, message):
    with pytest.raises(ValueError, match=message):
        row_topk(keys, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 48}, "power of two"),
        ({"sample": 8192}, "at most 4096"),
        ({"sample": 512, "rank": 1}, "what a row has"),
        ({"sample": 256, "rank": 0}, "rank"),
        ({"sample": 256, "rank": 257}, "rank"),
        ({"parts": 2}, "need a list"),
        ({"parts": 0}, "need a list"),
        ({"list": 3}, "even"),
        ({"rows_at_once": 0}, "positive"),
    ],
)
def test_plans_that_do_not_fit(kernels, changes, message):
    keys = torch.zeros(1, 500)
    with pytest.raises(ValueError, match=message):
        row_topk(keys, 1, plan=plan_of(kernels, keys, 1, **changes))


def test_passes_of_another_shape():
    with pytest.raises(ValueError, match=r"passes must be \[2\] int32"):
        row_topk(torch.zeros(2, 4), 1, passes=torch.zeros(3, dtype=torch.int32))


# The plan.


@pytest.mark.parametrize("rows", [1, 100, 8192])
@pytest.mark.parametrize("key_bytes", [2, 4])
def test_plans(kernels, rows, key_bytes):
    for exponent in range(10, 25):
        for k in (1, 32, 64, 256, 1024):
            n = 2**exponent + 1
            plan = kernels.row_topk_plan(rows, n, k, key_bytes)
            assert plan.failure <= 2**-20
            assert plan.sample or n <= ROOM
            assert plan.parts == 1 or plan.list
            assert plan.rows_at_once >= 1
            assert plan.expected < max(ROOM, 3 * plan.list)
            assert plan.workspace <= 2**26 + 2**24
            assert rows < 16 or n > 2**17 + 1 or plan.list == 0


@given(st.integers(20, 400), st.data())
def test_probabilities_bound_those_of_drawing_without_replacement(kernels, n, data):
    sample, marked = data.draw(st.integers(1, n)), data.draw(st.integers(1, n - 1))
    hits = data.draw(st.integers(1, sample))
    ways = [math.comb(marked, i) * math.comb(n - marked, sample - i) for i in range(sample + 1)]
    chance = [way / math.comb(n, sample) for way in ways]
    few = kernels.row_topk_too_few(n, marked + 1, sample, hits)
    assert sum(chance[hits:]) <= few * (1 + 1e-9) <= 1 + 1e-9
    many = kernels.row_topk_too_many(n, marked, sample, hits)
    assert sum(chance[: hits + 1]) <= many * (1 + 1e-9) <= 1 + 1e-9


@given(st.integers(0, 9), st.integers(0, 2**27))
def test_a_pack_of_each_cell_is_sampled(kernels, bits, more):
    cells = 2**bits
    packs = min(cells + more, 2**28)
    chosen = kernels.row_topk_sample(cells, packs)
    assert len(chosen) == cells
    for cell, pack in enumerate(chosen):
        assert packs * cell // cells <= pack < packs * (cell + 1) // cells


def test_the_sample_has_no_period(kernels):
    places = torch.tensor(kernels.row_topk_sample(1024, 2**17)) % 128
    counts = places.bincount(minlength=128)
    assert counts.max() < 25  # 8 on average


@settings(max_examples=200)
@given(st.integers(1, 600), st.integers(0, 2**28))
def test_parts_cover_a_row(kernels, parts, packs):
    begins = [kernels.row_topk_part_begin(part, parts, packs) for part in range(parts + 1)]
    assert begins[0] == 0
    assert begins[-1] == packs
    sizes = [b - a for a, b in itertools.pairwise(begins)]
    assert max(sizes) - min(sizes) <= 1
