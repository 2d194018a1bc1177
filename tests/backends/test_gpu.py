"""On a GPU: the same answers as on the CPU, and the same bits run to run."""

import pytest
import torch

import sparsekern as sk
from sparsekern.backends import check, cuda, triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run_step(device):
    generator = torch.Generator().manual_seed(0)
    sae = sk.SAE(48, 512, sk.TopK(7), dead_after=100, generator=generator, device=device)
    sae.tokens_since_fired[:60] = 100  # AuxK takes part
    trainer = sk.Trainer(sae, lr=1e-3)
    x = torch.randn(300, 48, generator=generator)
    stats = [trainer.step(x).to_floats() for _ in range(3)]
    return sae, stats, sae.encode(x.to(device))


@pytest.fixture(params=["triton", "cuda"])
def engine(request, monkeypatch):
    """Each backend of a GPU, chosen as it has to be."""
    found = {"triton": triton, "cuda": cuda}[request.param]
    reason = found.missing(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)
    if found is cuda:
        monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    return found


def test_training_agrees_with_the_cpu_and_repeats_itself(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("SPARSEKERN_BACKEND", raising=False)
        here, stats_here, codes_here = run_step("cpu")
    there, stats_there, codes_there = run_step("cuda")
    again, _, _ = run_step("cuda")
    for a, b in zip(stats_here, stats_there, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    torch.testing.assert_close(codes_there.values.cpu(), codes_here.values, rtol=1e-3, atol=1e-4)
    for name, tensor in there.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), here.state_dict()[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="one device"):
        sk.topk_encode(torch.ones(2, 4, device="cuda"), torch.ones(8, 4), None, 2)


def warm_trainer(x, **options):
    """A trainer after twelve steps, with AuxK for as many dead latents all the time."""
    generator = torch.Generator().manual_seed(0)
    sae = sk.SAE(x.shape[1], 512, sk.TopK(7), dead_after=100 * len(x), generator=generator, device="cuda")
    sae.b_enc.data[:60] = -3  # out of the race for the top k
    sae.tokens_since_fired[:60] = sae.dead_after
    trainer = sk.Trainer(sae, lr=1e-3, warmup_steps=0, **options)
    for _ in range(12):
        trainer.step(x)
    return trainer


def test_a_recorded_step_equals_one_that_is_launched():
    x = torch.randn(300, 48, device="cuda")
    launched, recorded = (warm_trainer(x, cuda_graph=cuda_graph) for cuda_graph in (False, True))
    assert recorded._graphs._recorded
    for _ in range(3):
        x = torch.randn(300, 48, device="cuda")
        stats = [trainer.step(x).to_floats() for trainer in (launched, recorded)]
        assert stats[0] == pytest.approx(stats[1], rel=1e-4)
    assert stats[0]["dead_fraction"] > 0
    state = launched.state_dict()
    for name, tensor in recorded.state_dict().items():  # not to the bit: a recorded rate is a float32
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_does_not_wait_for_the_device(cuda_graph):
    x = torch.randn(300, 48, device="cuda")
    trainer = warm_trainer(x, cuda_graph=cuda_graph)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = trainer.step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.to_floats()["skipped"] == 0


def test_every_check_of_the_kernels_passes(engine):
    assert [result for result in check.run(engine, "cuda") if not result.passed] == []
