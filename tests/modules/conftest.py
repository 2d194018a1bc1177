"""Every architecture, for the tests of what all of them must do."""

import pytest
import torch

import sparsekern as sk

D_IN, D_SAE = 12, 48

ARCHITECTURES = {
    "topk": lambda **o: sk.SAE(D_IN, D_SAE, sk.TopK(4), **o),
    "topk_tied": lambda **o: sk.SAE(D_IN, D_SAE, sk.TopK(4), tied=True, **o),
    "topk_multi": lambda **o: sk.SAE(D_IN, D_SAE, sk.TopK(4, multi_k=8), **o),
    "abstopk": lambda **o: sk.SAE(D_IN, D_SAE, sk.AbsTopK(4), **o),
    "groupmax": lambda **o: sk.SAE(D_IN, D_SAE, sk.GroupMax(4), **o),
    "batchtopk": lambda **o: sk.SAE(D_IN, D_SAE, sk.BatchTopK(4), **o),
    "relu": lambda **o: sk.SAE(D_IN, D_SAE, sk.ReLU(start_l0=4), **o),
    "relu_warming": lambda **o: sk.SAE(D_IN, D_SAE, sk.ReLU(p=0.5, start_l0=4, warmup_tokens=500), **o),
    "jumprelu": lambda **o: sk.SAE(D_IN, D_SAE, sk.JumpReLU(start_l0=4, bandwidth=0.3, pre_act_coefficient=0.01), **o),
    "gated": lambda **o: sk.GatedSAE(D_IN, D_SAE, sk.Gated(start_l0=4), **o),
    "matryoshka": lambda **o: sk.MatryoshkaSAE(D_IN, D_SAE, sk.BatchTopK(4), **o),
    "matryoshka_random": lambda **o: sk.MatryoshkaSAE(D_IN, D_SAE, sk.TopK(4), n_random=3, **o),
    "transcoder": lambda **o: sk.Transcoder(D_IN, D_SAE, sk.TopK(4), d_out=10, skip=True, **o),
    "crosscoder": lambda **o: sk.Crosscoder(2, D_IN, D_SAE, sk.ReLU(start_l0=4), **o),
    "cross_layer": lambda **o: sk.CrossLayerTranscoder(2, D_IN, D_SAE, sk.TopK(4), **o),
    "cross_layer_jumprelu": lambda **o: sk.CrossLayerTranscoder(
        2, D_IN, D_SAE, sk.JumpReLU(start_l0=4, bandwidth=0.3), **o
    ),
    "switch": lambda **o: sk.SwitchSAE(D_IN, D_SAE, sk.TopK(4), n_experts=4, feature_scaling=True, **o),
    "switch_two": lambda **o: sk.SwitchSAE(
        D_IN, D_SAE, sk.TopK(4), n_experts=4, n_active=2, gate="softmax", balance="bias", z_coefficient=0.01, **o
    ),
    "hierarchy": lambda **o: sk.HierarchicalSAE(D_IN, [(6, 3), (4, 2), (2, 1)], **o),
    "h_sae": lambda **o: sk.HierarchicalSAE(D_IN, [(8, 3), (6, 1)], subspace_dim=3, **o),
}


class Architecture:
    """A class of modules with one of its configurations, by its name in the table."""

    def __init__(self, name):
        self.name = name

    def build(self, **options):
        """A fresh module, always the same."""
        return ARCHITECTURES[self.name](generator=torch.Generator().manual_seed(1), **options)

    def batch(self, rows=24, seed=0, dtype=torch.float32):
        """Arguments of `loss`: activations ``[rows, d_in]``, and their target where it is another."""
        sae, generator = self.build(device="meta"), torch.Generator().manual_seed(seed)
        x = torch.randn(rows, sae.d_in, generator=generator)
        if sae.reads == "output" and not isinstance(sae, sk.CrossLayerTranscoder):
            return (x.to(dtype),)
        return x.to(dtype), torch.randn(rows, sae.d_out, generator=generator).to(dtype)

    def used(self):
        """A module in the middle of its training: some latents are dead, one is about to be."""
        sae = self.build()
        x, *target = self.batch(64, seed=100)
        sae.fit_start_(x, target=target[0] if target else None)
        for seed in (101, 102):
            sae.loss(*self.batch(seed=seed))
        sae.dead_after = 100
        sae.tokens_since_fired[::5] = 100
        sae.tokens_since_fired[3] = 80
        return sae


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return Architecture(request.param)


@pytest.fixture(scope="session")
def every_architecture():
    return [Architecture(name) for name in ARCHITECTURES]
