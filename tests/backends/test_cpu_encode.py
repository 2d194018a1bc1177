"""The screened encoder of the CPU kernels: exact on every kind of input and every shape, at every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import cpu, reference
from sparsekern.bench.exactness import CASES, wrong_rows

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")


def encode(problem, k, absolute=False):
    return cpu.topk_encode(problem.x, problem.weight, problem.bias, k, "int8", absolute)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rows", "n", "d", "k"), [(500, 3001, 67, 32), (100, 1000, 384, 5)])
def test_no_wrong_index(case, rows, n, d, k, absolute):
    problem = CASES[case](rows, n, d)
    values, indices = encode(problem, k, absolute)
    assert not wrong_rows(problem, indices, absolute).any()
    x, weight, bias = (t.double() for t in problem)
    expected = (weight[indices.long()] * x.unsqueeze(1)).sum(2) + bias[indices.long()]
    scale = x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max() + bias.abs().max()
    assert ((values - (expected if absolute else expected.relu())).abs() <= 1e-6 * scale).all()
    assert (values.abs().diff(dim=1) <= 0).all()


@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 300),
    d=st.integers(1, 140),
    share=st.floats(0, 1),
    case=st.sampled_from(sorted(CASES)),
    seed=st.integers(0, 2**31),
    absolute=st.booleans(),
)
def test_any_shape(rows, n, d, share, case, seed, absolute):
    torch.manual_seed(seed)
    problem = CASES[case](rows, n, d)
    k = 1 + round(share * (n - 1))
    _, indices = encode(problem, k, absolute)
    assert not wrong_rows(problem, indices, absolute).any()


def test_one_row_one_latent_and_all_latents():
    problem = CASES["random"](1, 65, 64)
    for k in (1, 64, 65):
        values, indices = encode(problem, k)
        expected = reference.topk_encode(*problem, k, "none")
        torch.testing.assert_close(values, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("absolute", [False, True])
def test_whole_numbers_give_the_reference_to_the_bit(absolute):
    """Sums of small whole numbers are exact in any order, and full of ties."""
    x, weight = torch.randint(-2, 3, (60, 30)).float(), torch.randint(-2, 3, (2000, 30)).float()
    bias = torch.randint(-3, 2, (2000,)).float()
    for k in (1, 17, 100):
        for mine, theirs in zip(
            cpu.topk_encode(x, weight, bias, k, "int8", absolute),
            reference.topk_encode(x, weight, bias, k, "none", absolute),
            strict=True,
        ):
            assert torch.equal(mine, theirs)


def test_views_with_offsets_and_strides():
    x = torch.randn(70, 200)[3::2, 11:141]
    weight = torch.randn(900, 300)[100:, 7:137]
    bias = torch.randn(1600)[::2]
    for view, whole in ((x, x.contiguous()), (x.T.contiguous().T, x.contiguous())):
        got = cpu.topk_encode(view, weight, bias, 9, "int8")
        expected = cpu.topk_encode(whole, weight.contiguous(), bias.contiguous(), 9, "int8")
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_the_same_bits_for_any_number_of_threads():
    problem = CASES["zipf"](400, 3000, 100)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encode(problem, 20))
    finally:
        torch.set_num_threads(before)
    for values, indices in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(indices, results[0][1])


def test_screening_spares_most_of_the_work_and_says_how_much():
    encode(CASES["random"](200, 8192, 256), 32)
    assert cpu.last_encode.rows == 200
    assert cpu.last_encode.repaired == 0
    assert 32 * 200 <= cpu.last_encode.rescored < 0.05 * 200 * 8192


def test_weights_that_are_not_finite_are_left_to_the_reference():
    problem = CASES["random"](20, 2000, 64)
    problem.weight[7, 3] = float("inf")
    problem.x[:, 3] = problem.x[:, 3].abs() + 1
    _, indices = encode(problem, 4)
    assert (indices == 7).any(1).all()
    assert cpu.last_encode.repaired == 20


def test_biases_that_are_not_finite_are_left_to_the_reference():
    problem = CASES["random"](20, 2000, 64)
    problem.bias[7] = float("inf")
    _, indices = encode(problem, 4)
    assert (indices == 7).any(1).all()
    assert cpu.last_encode.repaired == 20


@pytest.mark.parametrize("absolute", [False, True])
def test_enormous_and_minute_inputs_are_repaired_not_wrong(absolute):
    problem = CASES["random"](12, 2000, 64)
    problem.x[3] *= 1e18
    problem.x[5] *= 1e-33
    _, indices = encode(problem, 4, absolute)
    assert not wrong_rows(problem, indices, absolute).any()
    assert cpu.last_encode.repaired == 2


def test_rows_with_too_many_candidates_are_repaired():
    """Thousands of equal scores cannot be told apart by any screening."""
    problem = CASES["random"](9, 9000, 64)
    problem.weight[:] = problem.weight[0]
    problem.bias.zero_()
    _, indices = encode(problem, 6)
    assert torch.equal(indices, torch.arange(6, dtype=torch.int32).expand(9, -1))
    assert cpu.last_encode.repaired == 9


def test_auto_screens_where_it_pays_only(monkeypatch):
    monkeypatch.setattr(cpu, "last_encode", None)
    weight = torch.randn(4096, 64)
    sk.topk_encode(torch.randn(2, 64), weight, None, 8)
    sk.topk_encode(torch.randn(64, 64), weight, None, 2048)
    sk.topk_encode(torch.randn(64, 64), weight, None, 8, screen="none")
    assert cpu.last_encode is None
    sk.topk_encode(torch.randn(64, 64), weight, None, 8)
    assert (cpu.last_encode is not None) == cpu.screens(4096, 64)


class TestQuantizedCopy:
    """The copy that an optimizer keeps is used while it is that of the weight, and not a moment longer."""

    def setup_method(self):
        torch.manual_seed(0)
        self.problem = CASES["random"](30, 2000, 64)
        self.copy = cpu.quantized(self.problem.weight)

    def check(self, current):
        assert self.copy.is_current(self.problem.weight) == current
        _, indices = encode(self.problem, 5)
        assert not wrong_rows(self.problem, indices).any()

    def test_it_is_used(self):
        self.check(current=True)
        self.copy.packed.fill_(128)  # would be noticed
        self.copy.error.zero_()
        self.copy.norm.zero_()
        _, indices = encode(self.problem, 5)
        assert wrong_rows(self.problem, indices).any()

    def test_changes_through_torch_are_seen(self):
        self.problem.weight[1500:, 9:].neg_()
        self.check(current=False)

    def test_changes_through_data_are_seen(self):
        self.problem.weight.data[77] = self.problem.x[0]
        self.check(current=False)

    def test_it_goes_with_its_owner(self):
        address = self.problem.weight.data_ptr()
        assert address in cpu._quantized
        del self.copy
        assert address not in cpu._quantized
