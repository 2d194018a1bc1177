"""The screened encoders of the CPU kernels with any number of latents a row: exact on every kind of input and shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.backends import cpu, reference
from sparsekern.bench.exactness import CASES

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")


def exact_scores(problem):
    """In float64, and how far from it float32 may be."""
    x, weight, bias = (t.double() for t in problem)
    scale = x.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    return x @ weight.T + bias, 1e-5 * scale + 1e-30


def taken_and_values(found, shape):
    """Which entries there are, and the values as a matrix; CSR form, rising latents."""
    crow, col, values = found
    assert (crow.dtype, col.dtype, values.dtype) == (torch.int64, torch.int32, torch.float32)
    assert crow[0] == 0
    assert crow[-1] == col.numel() == values.numel()
    rows = torch.arange(shape[0]).repeat_interleave(crow.diff())
    positions = rows * shape[1] + col
    assert (positions.diff() > 0).all()
    taken, dense = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
    taken.view(-1)[positions] = True
    dense.view(-1)[positions] = values.double()
    return taken, dense


def check_batch(problem, k, found=None):
    x, weight, bias = problem
    shape = (x.shape[0], weight.shape[0])
    count = int(k * shape[0])
    taken, dense = taken_and_values(found or cpu.batch_topk_encode(x, weight, bias, count, "int8"), shape)
    scores, error = exact_scores(problem)
    assert taken.sum() == count
    assert ((dense - torch.where(taken, scores.relu(), 0)).abs() <= error).all()
    # The set is that of exact arithmetic, up to the rounding of float64 itself; ties go to the lower position.
    order = scores.flatten().sort(descending=True, stable=True)
    cut = order.values[count - 1]
    level = (scores - cut).abs() <= 1e-8 * error
    assert taken[(scores > cut) & ~level].all()
    assert not taken[(scores < cut) & ~level].any()
    of_level = taken.flatten()[level.flatten()]
    assert not of_level[int(of_level.sum()) :].any()


def check_threshold(problem, threshold, found=None):
    x, weight, bias = problem
    threshold = torch.as_tensor(threshold, dtype=torch.float32)
    found = found or cpu.threshold_encode(x, weight, bias, threshold, "int8")
    taken, dense = taken_and_values(found, (x.shape[0], weight.shape[0]))
    scores, error = exact_scores(problem)
    assert ((dense - torch.where(taken, scores, 0)).abs() <= error).all()
    assert (found[2].double() > threshold.expand(weight.shape[0])[found[1].long()]).all()  # as float32 compares
    assert taken[scores > threshold + error].all()
    assert not taken[scores < threshold - error].any()


@pytest.mark.parametrize("case", [case for case in CASES if case != "tiny_norms"])
@pytest.mark.parametrize(("rows", "n", "d", "k"), [(200, 3001, 67, 32), (60, 1000, 384, 5)])
def test_every_kind_of_input(case, rows, n, d, k):
    problem = CASES[case](rows, n, d)
    check_batch(problem, k)
    cut = exact_scores(problem)[0].flatten().kthvalue(rows * (n - k)).values
    check_threshold(problem, cut)
    check_threshold(problem, cut + 0.1 * torch.randn(n))
    check_threshold(problem, -cut.abs())


@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 300),
    d=st.integers(1, 140),
    share=st.floats(0, 1),
    case=st.sampled_from(["random", "zipf", "outliers", "near_ties", "all_negative"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, n, d, share, case, seed):
    torch.manual_seed(seed)
    problem = CASES[case](rows, n, d)
    k = 1 + round(share * (n - 1))
    check_batch(problem, k)
    check_threshold(problem, exact_scores(problem)[0].flatten()[-1])


def whole_numbers(rows=60, n=2000, d=30):
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-2, 3, (n, d)).float()
    return x, weight, torch.randint(-3, 2, (n,)).float()


def assert_equal(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(4))
def test_whole_numbers_give_the_reference_to_the_bit(seed):
    """Sums of small whole numbers are exact in any order, and full of ties. Some rows are huge, zero or repeated."""
    torch.manual_seed(seed)
    x, weight, bias = whole_numbers()
    x[3] *= 500
    x[11] = x[10]
    x[20:30] = 0
    x[:, 7] *= 60
    weight[1500:] = weight[:500]
    for count in (1, len(x), 17 * len(x) + 5, 100 * len(x)):
        assert_equal(
            cpu.batch_topk_encode(x, weight, bias, count, "int8"),
            reference.batch_topk_encode(x, weight, bias, count, "none"),
        )
    for threshold in (torch.tensor(20.0), torch.tensor(-5.0), torch.randint(-9, 30, (2000,)).float()):
        assert_equal(
            cpu.threshold_encode(x, weight, bias, threshold, "int8"),
            reference.threshold_encode(x, weight, bias, threshold, "none"),
        )


def test_batches_of_many_blocks_of_rows():
    """More rows than there is room for the candidates of: blocks share one selection."""
    x, weight, bias = whole_numbers(30000, 700, 8)
    x[::999] *= 30
    for count in (2 * 30000, 40 * 30000 - 7):
        assert_equal(
            cpu.batch_topk_encode(x, weight, bias, count, "int8"),
            reference.batch_topk_encode(x, weight, bias, count, "none"),
        )
    assert cpu.last_encode.repaired == 0


def test_rows_with_too_many_candidates_are_computed_in_full_and_merged(monkeypatch):
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 2 * 4 * 20000)  # two rows at a time
    x, weight, bias = CASES["random"](60, 20000, 64)
    x[[5, 33, 48]] *= torch.tensor([[3e3], [4e2], [9e3]])
    check_batch((x, weight, bias), 32)
    assert 1 <= cpu.last_encode.repaired <= 3
    problem = x[:30], weight, bias
    check_threshold(problem, 4.0)
    assert cpu.last_encode.repaired == 1
    check_threshold(problem, 0.0)
    assert cpu.last_encode.repaired == 30


def test_equal_rows_of_weights_are_taken_in_order():
    """Thousands of equal scores cannot be told apart by any screening."""
    x, weight, _ = CASES["random"](9, 9000, 64)
    weight[:] = weight[0]
    found = cpu.batch_topk_encode(x, weight, None, 54, "int8")
    assert cpu.last_encode.repaired >= 1
    best = int((x @ weight[0]).argmax())
    assert found[0].tolist() == [0 if row <= best else 54 for row in range(10)]
    assert torch.equal(found[1], torch.arange(54, dtype=torch.int32))


def test_thresholds_that_are_infinite_or_enormous():
    x, weight, bias = CASES["random"](12, 500, 40)
    threshold = torch.full((500,), torch.inf)
    threshold[3], threshold[400], threshold[401:403] = -torch.inf, -1e30, torch.tensor([1e30, 3e38])
    crow, col, values = cpu.threshold_encode(x, weight, bias, threshold, "int8")
    assert torch.equal(col.view(12, 2), torch.tensor([[3, 400]] * 12, dtype=torch.int32))
    torch.testing.assert_close(values.view(12, 2), x @ weight[[3, 400]].T + bias[[3, 400]])
    for threshold in (torch.inf, 3e38):
        crow, col, values = cpu.threshold_encode(x, weight, bias, torch.tensor(threshold), "int8")
        assert crow.tolist() == [0] * 13
        assert col.shape == values.shape == (0,)


def test_weights_and_biases_that_are_not_finite_are_left_to_the_reference():
    x, weight, bias = CASES["random"](20, 2000, 64)
    for tensor, where in ((weight, (7, 3)), (bias, 7)):
        for value in (torch.inf, torch.nan):
            before = tensor[where].clone()
            tensor[where] = value
            for mine, theirs in (
                (
                    cpu.batch_topk_encode(x, weight, bias, 80, "int8"),
                    reference.batch_topk_encode(x, weight, bias, 80, "none"),
                ),
                (
                    cpu.threshold_encode(x, weight, bias, torch.tensor(3.0), "int8"),
                    reference.threshold_encode(x, weight, bias, torch.tensor(3.0), "none"),
                ),
            ):
                assert cpu.last_encode.repaired == 20
                assert torch.equal(mine[0], theirs[0])
                assert torch.equal(mine[1], theirs[1])
            tensor[where] = before


def test_views_with_offsets_and_strides(poisoned_memory):
    x = torch.randn(70, 200)[3::2, 11:141]
    weight = torch.randn(900, 300)[100:, 7:137]
    bias, threshold = torch.randn(1600)[::2], 25 + torch.randn(1600)[::2]
    for view in (x, x.T.contiguous().T):
        plain = [t.contiguous() for t in (x, weight, bias)]
        assert_equal(cpu.batch_topk_encode(view, weight, bias, 310, "int8"), cpu.batch_topk_encode(*plain, 310, "int8"))
        assert_equal(
            cpu.threshold_encode(view, weight, bias, threshold, "int8"),
            cpu.threshold_encode(*plain, threshold.contiguous(), "int8"),
        )


def test_the_same_bits_for_any_number_of_threads():
    x, weight, bias = CASES["outliers"](200, 3000, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    *cpu.batch_topk_encode(x, weight, bias, 4000, "int8"),
                    *cpu.threshold_encode(x, weight, bias, torch.tensor(9.0), "int8"),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal(result, results[0])


def test_screening_spares_most_of_the_work_and_says_how_much():
    x, weight, bias = CASES["random"](200, 8192, 256)
    for _ in range(2):
        cpu.batch_topk_encode(x, weight, bias, 6400, "int8")
        stats = cpu.last_encode
        cpu.threshold_encode(x, weight, bias, cpu.topk_encode(x, weight, bias, 32, "int8")[0][:, -1].mean(), "int8")
        for found in (stats, cpu.last_encode):
            assert found.rows == 200
            assert found.repaired == 0
            assert 20 * 200 <= found.rescored < 0.05 * 200 * 8192
        _copy = cpu.quantized(weight)  # then once more with a copy that somebody keeps


def test_auto_screens_where_it_pays_only(monkeypatch):
    monkeypatch.setattr(cpu, "last_encode", None)
    weight, threshold = torch.randn(4096, 64), torch.tensor(20.0)
    cpu.batch_topk_encode(torch.randn(64, 64), weight, None, 64 * 2048, "auto")
    cpu.batch_topk_encode(torch.randn(64, 64), weight, None, 64 * 8, "none")
    cpu.threshold_encode(torch.randn(2, 64), weight, None, threshold, "auto")
    cpu.threshold_encode(torch.randn(64, 64), weight, None, threshold, "none")
    assert cpu.last_encode is None
    cpu.threshold_encode(torch.randn(64, 64), weight, None, threshold, "auto")
    assert (cpu.last_encode is not None) == cpu.screens(4096, 64)
    monkeypatch.setattr(cpu, "last_encode", None)
    cpu.batch_topk_encode(torch.randn(64, 64), weight, None, 64 * 8, "auto")
    assert (cpu.last_encode is not None) == cpu.screens(4096, 64)
