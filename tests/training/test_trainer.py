"""One step of training against the same step written out."""

import os
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from sparsekern.backends import cpu
from sparsekern.training.schedule import default_lr, warmup_and_decay


def make(**options):
    return sk.SAE(10, 32, sk.TopK(4), generator=torch.Generator().manual_seed(3), **options)


def test_steps_equal_the_written_out_loop():
    """Adam of torch, clip, projection, unit rows: to the last bit where the arithmetic is the same."""
    batches = torch.randn(6, 40, 10)
    mine, theirs = make(dead_after=50), make(dead_after=50)
    trainer = sk.Trainer(mine, lr=1e-2, steps=6, warmup_steps=2, decay_share=0.5, clip_norm=0.05)
    theirs.fit_start_(batches[0])
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=True)
    for step, x in enumerate(batches):
        stats = trainer.step(x)
        out = theirs.loss(x)
        optimizer.zero_grad()
        out.total.backward()
        along = (theirs.W_dec.grad * theirs.W_dec).sum(1, keepdim=True)
        theirs.W_dec.grad -= along * theirs.W_dec.detach()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = stats.lr
        optimizer.step()
        with torch.no_grad():
            theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
        assert stats.step == step + 1
        assert stats.tokens == 40 * (step + 1)
        torch.testing.assert_close(stats.loss, out.total.detach())
        torch.testing.assert_close(stats.grad_norm, norm)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert torch.equal(mine.tokens_since_fired, theirs.tokens_since_fired)


def test_it_learns_planted_features():
    directions = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
    x = ((torch.rand(4000, 20) < 0.1) * (0.5 + torch.rand(4000, 20))) @ directions
    sae = sk.SAE(16, 40, sk.TopK(4), dead_after=5000, generator=torch.Generator().manual_seed(0))
    trainer = sk.Trainer(sae, lr=1e-2, steps=300)
    for _ in range(300):
        stats = trainer.step(x[torch.randint(0, 4000, (256,))])
    assert stats.fvu < 0.1
    found = (sae.W_dec @ directions.T).max(0).values
    assert (found > 0.9).float().mean() > 0.8


def test_state_round_trip_continues_to_the_same_bits():
    batches = torch.randn(8, 30, 10)
    whole = sk.Trainer(make(dead_after=60), lr=1e-2, steps=8)
    for x in batches:
        whole.step(x)
    first = sk.Trainer(make(dead_after=60), lr=1e-2, steps=8)
    for x in batches[:5]:
        first.step(x)
    second = sk.Trainer(sk.SAE(10, 32, sk.TopK(4), dead_after=60), lr=1e-2, steps=8)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for x in batches[5:]:
        second.step(x)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_bad_input_changes_nothing():
    trainer = sk.Trainer(make(), lr=1e-2)
    trainer.step(torch.randn(20, 10))
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    bad = torch.randn(20, 10)
    bad[7, 1] = float("nan")
    for x, message in [
        (bad, "first in row 7"),
        (torch.randn(20, 9), "x must have 10 columns"),
        (torch.ones(20, 10, dtype=torch.int64), "floating-point"),
        (torch.ones(0, 10), "at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.step(x)
    for name, tensor in trainer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bad_input_to_the_first_step_changes_nothing_either():
    sae = make()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    trainer = sk.Trainer(sae)
    nan = torch.full((20, 10), float("nan"))
    x = torch.randn(20, 10)
    for arguments in [(x, x[:19]), (x[:1],), (nan,), (x, nan)]:
        with pytest.raises(ValueError, match=r"target must|two tokens|first in row 0"):
            trainer.step(*arguments)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_loss_that_overflows_changes_nothing(monkeypatch, backend):
    if backend == "cpu" and cpu.isa() is None:
        pytest.skip("the native kernels are not built")
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
    trainer = sk.Trainer(make(), lr=1e-2)
    trainer.step(torch.randn(20, 10))
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    stats = trainer.step(1e30 * torch.randn(20, 10))
    after = trainer.state_dict()
    for name in before.keys() - {"trainer.steps_done", "trainer.tokens_seen"}:
        assert torch.equal(after[name], before[name]), name
    with pytest.raises(ValueError, match=r"made the loss overflow, in 1 of 2 batches"):
        stats.to_floats()


def test_the_start_of_a_trained_module_is_left_alone():
    sae = make()
    with torch.no_grad():
        sae.b_dec.fill_(5.0)
    sk.Trainer(sae, lr=1e-12).step(torch.randn(20, 10))
    torch.testing.assert_close(sae.b_dec.data, torch.full((10,), 5.0))
    torch.testing.assert_close(sae.W_enc.data, make().W_enc.data)
    sae = make()
    sk.Trainer(sae, lr=1e-12, fit_start=False).step(torch.randn(20, 10))
    torch.testing.assert_close(sae.W_enc.data, make().W_enc.data)


def test_schedule():
    factors = [warmup_and_decay(step, 4, 20, 0.5) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:10] == [1.0] * 5
    assert factors[-1] == pytest.approx(0.1)
    assert warmup_and_decay(10**9, 1000, None, 0.2) == 1.0
    assert default_lr(2**14) == pytest.approx(2e-4)
    assert default_lr(2**16) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be above 0, got -1"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, got 'sgd'"),
        ({"learning_rate": 1}, "unknown option 'learning_rate'"),
        ({"warmup": 1}, "unknown option 'warmup'; did you mean 'warmup_steps'"),
        ({"decay_share": 1.5}, "decay_share must be at most 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sk.Trainer(make(), **options)


_STEP_MEMORY = """
import torch, sparsekern as sk
from sparsekern.bench import memory
sae = sk.SAE(256, 32768, sk.TopK(16))
trainer = sk.Trainer(sae, lr=1e-3)
x = torch.randn(512, 256)
before = memory.resident()
trainer.step(x)
trainer.step(x)
print(memory.resident() - before, memory.growth(lambda: trainer.step(x)))
"""


@pytest.mark.skipif(cpu.isa() in (None, "generic"), reason="needs the screened encoder")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_keeps_little_beyond_parameters_and_optimizer():
    """Two weights of 33.5 MB, their moments, the int8 copy of one: no dense gradient, no tokens × latents tensor."""
    run = subprocess.run(
        [sys.executable, "-c", _STEP_MEMORY], env=os.environ, capture_output=True, text=True, check=True
    )
    kept, during = (int(number) / 1e6 for number in run.stdout.split())
    moments, copy, dense_gradient = 4 * 33.5, 8.5, 67
    assert kept < moments + copy + 50  # and the workspace, most of which is candidates
    assert during < dense_gradient / 4


def test_a_token_of_several_sources_is_one_token():
    trainer = sk.Trainer(sk.Crosscoder(3, 4, 16, sk.TopK(2)))
    assert trainer.step(torch.randn(10, 3, 4)).tokens == 10
