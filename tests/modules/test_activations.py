"""What single activations keep: BatchTopK's threshold, JumpReLU's, Multi-TopK's codes, copies, and their arguments."""

import copy
import pickle

import pytest
import torch

import sparsekern as sk


def make(activation, d=8, n=32, **options):
    return sk.SAE(d, n, activation, generator=torch.Generator().manual_seed(1), **options)


def dense_pre(sae, x):
    return ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()


def test_the_threshold_of_batchtopk_is_a_running_mean_of_the_least_kept():
    sae, rate = make(sk.BatchTopK(3, threshold_rate=0.1), dtype=torch.float64), 0.1
    act, expected = sae.activation, None
    for step in range(6):
        x = (1 + step) * torch.randn(20, 8, dtype=torch.float64)
        least = dense_pre(sae, x).relu().flatten().topk(60).values.min()
        sae.loss(x)
        expected = least if expected is None else expected + rate * (least - expected)
        torch.testing.assert_close(act.threshold, expected)
        assert act.batches_seen == step + 1
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    sae.loss(x)  # a batch that keeps nothing
    sae.eval().loss(x)  # and evaluation
    torch.testing.assert_close(act.threshold, expected)
    assert act.batches_seen == 6


def test_the_least_of_batchtopk_is_the_least_positive_one():
    sae = make(sk.BatchTopK(30))
    x = torch.randn(20, 8)
    sae.loss(x)  # keeps 600 of 640, of which half are positive
    pre = dense_pre(sae, x)
    torch.testing.assert_close(sae.activation.threshold, pre[pre > 0].min().double())


def test_evaluation_of_batchtopk_keeps_what_passes_the_threshold():
    sae, x = make(sk.BatchTopK(3)), torch.randn(40, 8)
    assert sae.eval().encode(x).col.numel() == 120, "no threshold yet: the batch decides"
    sae.train().loss(x[:20])
    pre = dense_pre(sae, x)
    expected = pre * (pre > sae.activation.threshold)
    for copied in (sae, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae).double().float()):
        torch.testing.assert_close(copied.eval().encode(x).to_dense(), expected)
        assert copied.train().encode(x).col.numel() == 120
    fresh = make(sk.BatchTopK(3)).eval()
    fresh.load_state_dict(sae.state_dict())
    torch.testing.assert_close(fresh.encode(x).to_dense(), expected)
    fresh.load_state_dict(make(sk.BatchTopK(3)).state_dict())
    assert fresh.encode(x).col.numel() == 120


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_the_threshold_of_batchtopk_is_used_to_its_last_bit_after_a_cast(cast):
    sae = make(sk.BatchTopK(3))
    sae.activation.threshold.fill_(1 + 1e-6)  # which float16 and bfloat16 round to 1
    sae.activation.batches_seen.fill_(1)
    sae.to(cast).eval()
    assert sae.activation.threshold == 1 + 1e-6
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1)
    assert sae.encode(torch.randn(5, 8).to(cast)).col.numel() == 0


def test_thresholds_of_jumprelu_train_by_less_than_bfloat16_resolves():
    sae = make(sk.JumpReLU(start_l0=4, l0_coefficient=1.0), dtype=torch.bfloat16)
    trainer = sk.Trainer(sae, lr=1e-5, warmup_steps=0)
    trainer.step(torch.randn(60, 8).bfloat16())
    before = sae.activation.relative_threshold.detach().clone()
    trainer.step(torch.randn(60, 8).bfloat16())
    moved = (sae.activation.relative_threshold - before).abs()
    assert 0 < moved.max() < 3e-5


def test_thresholds_of_jumprelu_start_and_end_where_their_l0_is():
    """With a large weight on the target, training alone meets it."""
    sae = make(sk.JumpReLU(target_l0=5, l0_coefficient=10.0, bandwidth=0.2, start_l0=12))
    x = torch.randn(400, 8)
    trainer = sk.Trainer(sae, lr=1e-2, warmup_steps=0)
    first = trainer.step(x).l0
    for _ in range(150):
        last = trainer.step(x).l0
    assert first == pytest.approx(12, abs=0.1)
    assert last == pytest.approx(5, abs=0.5)


def test_one_activation_given_to_two_modules_is_copied(new_activation):
    act = new_activation()
    first, second = (make(act).double(), make(act).double())
    x = torch.randn(30, 8, dtype=torch.float64)
    tensors = [{t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (first, second, act)]
    assert not tensors[0] & tensors[1] | tensors[0] & tensors[2] | tensors[1] & tensors[2]
    given = copy.deepcopy(act.state_dict())
    before = copy.deepcopy(second.state_dict())
    trainer = sk.Trainer(first, lr=0.1, warmup_steps=0)
    for _ in range(3):
        trainer.step(x)
    for now, then in ((second.state_dict(), before), (act.state_dict(), given)):
        for name, tensor in now.items():
            assert torch.equal(tensor, then[name]), name


def test_the_codes_of_multi_topk_are_those_of_topk():
    x = torch.randn(30, 8)
    plain, multi = make(sk.TopK(3)), make(sk.TopK(3, multi_k=12))
    for mine, theirs in zip(multi.encode(x), plain.encode(x), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert "multi" in multi.loss(x).parts
    assert "multi" not in multi.eval().loss(x).parts


def test_a_penalty_rises_with_the_tokens_seen():
    sae, x = make(sk.ReLU(0.5, warmup_tokens=90)), torch.randn(30, 8)
    sizes = [sae.loss(x).parts["sparsity"].item() for _ in range(5)]
    assert sizes == pytest.approx([share * sizes[-1] for share in (0, 1 / 3, 2 / 3, 1, 1)])
    assert sae.activation.tokens_seen == 150


def test_a_tied_unit_module_keeps_its_rows_at_the_start():
    sae = make(sk.TopK(3), tied=True, unit_decoder=True)
    sae.fit_start_(torch.randn(50, 8))
    assert sae.W_enc is sae.W_dec
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.TopK(3, multi_k=3), "multi_k must be a whole number above k=3, got 3"),
        (lambda: sk.TopK(3, multi_k=6.0), "multi_k must be a whole number above k=3, got 6.0"),
        (lambda: sk.TopK(3, multi_coefficient=-1), "multi_coefficient must not be negative and must be finite, got -1"),
        (lambda: make(sk.TopK(3, multi_k=33)), "multi_k must be at most d_sae=32, got 33"),
        (lambda: make(sk.TopK(33)), "k must be at most d_sae=32, got 33"),
        (lambda: sk.AbsTopK(0), "k must be a whole number of at least 1, got 0"),
        (lambda: sk.AbsTopK(2, screen="fp4"), "screen must be one of auto, none, .* got 'fp4'"),
        (lambda: make(sk.AbsTopK(33)), "k must be at most d_sae=32, got 33"),
        (lambda: sk.GroupMax(1.5), "k must be a whole number of at least 1, got 1.5"),
        (lambda: make(sk.GroupMax(5)), "k must divide d_sae=32, got 5"),
        (lambda: sk.BatchTopK(-1), "k must be a number above 0, got -1"),
        (lambda: make(sk.BatchTopK(33)), "k must be at most d_sae=32, got 33"),
        (lambda: sk.BatchTopK(3, threshold_rate=0), "threshold_rate must be above 0 and at most 1, got 0"),
        (lambda: sk.BatchTopK(3, threshold_rate=float("nan")), "threshold_rate must be above 0 and at most 1, got nan"),
        (lambda: sk.ReLU(-0.1), "l1_coefficient must not be negative and must be finite, got -0.1"),
        (lambda: sk.ReLU(float("nan")), "l1_coefficient must not be negative and must be finite, got nan"),
        (lambda: sk.ReLU(p=0), "p must be above 0 and at most 1, got 0"),
        (lambda: sk.ReLU(p=1.5), "p must be above 0 and at most 1, got 1.5"),
        (lambda: sk.ReLU(warmup_tokens=-1), "warmup_tokens must be a whole number of at least 0, got -1"),
        (lambda: sk.ReLU(warmup_tokens=0.5), "warmup_tokens must be a whole number of at least 0, got 0.5"),
        (lambda: sk.ReLU(start_l0=0), "start_l0 must be a whole number of at least 1, got 0"),
        (lambda: sk.ReLU(screen="fast"), "screen must be one of"),
        (lambda: sk.JumpReLU(target_l0=0), "target_l0 must be above 0, got 0"),
        (lambda: sk.JumpReLU(bandwidth=0), "bandwidth must be above 0, got 0"),
        (lambda: sk.JumpReLU(-1), "l0_coefficient must not be negative and must be finite, got -1"),
        (lambda: sk.JumpReLU(pre_act_coefficient=-1), "pre_act_coefficient must not be negative and must be finite"),
        (lambda: sk.JumpReLU(start_l0=2.5), "start_l0 must be a whole number of at least 1, got 2.5"),
        (lambda: sk.Gated(-1), "l1_coefficient must not be negative and must be finite, got -1"),
        (lambda: make(sk.TopK(3), aux_k=1.5), "aux_k must be a whole number of at least 1, got 1.5"),
        (
            lambda: sk.SAE.from_config({"class": "SAE", "d_in": 4, "d_sae": 8, "activation": {"name": "softmax"}}),
            "activation must be one of topk, abstopk, groupmax, batchtopk, relu, jumprelu, gated, got 'softmax'",
        ),
        (
            lambda: sk.SAE.from_config({"class": "SAE", "d_in": 4, "d_sae": 8, "activation": {"name": "topk", "j": 1}}),
            "the configuration does not fit SAE: .*unexpected keyword argument 'j'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
