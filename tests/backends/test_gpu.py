"""On a GPU: the same answers as on the CPU, and the same bits run to run."""

import pytest
import torch

import sparsekern as sk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run_step(device):
    generator = torch.Generator().manual_seed(0)
    sae = sk.SAE(48, 512, sk.TopK(7), dead_after=100, generator=generator, device=device)
    sae.tokens_since_fired[:60] = 100  # AuxK takes part
    trainer = sk.Trainer(sae, lr=1e-3)
    x = torch.randn(300, 48, generator=generator)
    stats = [trainer.step(x).to_floats() for _ in range(3)]
    return sae, stats, sae.encode(x.to(device))


def test_training_agrees_with_the_cpu_and_repeats_itself():
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
