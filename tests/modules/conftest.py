"""Small modules of every kind.

`architecture`: all classes in typical configurations, for what a PyTorch module must do. `kind`: every class with every
activation that it allows, for what each must compute.
"""

from typing import NamedTuple

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
        with torch.no_grad():
            for weight in sae.latent_weights():  # a transcoder's start at zero
                if not weight.any():
                    weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
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


ACTIVATIONS = {
    "topk": lambda: sk.TopK(3),
    "multi-topk": lambda: sk.TopK(3, multi_k=7, multi_coefficient=0.3),
    "abstopk": lambda: sk.AbsTopK(3),
    "groupmax": lambda: sk.GroupMax(4),
    "batchtopk": lambda: sk.BatchTopK(3),
    "relu": lambda: sk.ReLU(0.3, start_l0=3),
    "lp": lambda: sk.ReLU(0.3, p=0.5, warmup_tokens=100, start_l0=3),
    "jumprelu": lambda: sk.JumpReLU(0.2, bandwidth=0.8, pre_act_coefficient=0.1, start_l0=3),
    "jumprelu-target": lambda: sk.JumpReLU(
        target_l0=3, bandwidth=0.8, pre_act_coefficient=0.1, warmup_tokens=100, start_l0=3
    ),
    "gated": lambda: sk.Gated(0.3, warmup_tokens=100, start_l0=3),
}

MODULES = {
    "sae": lambda act, d, n, **o: sk.SAE(d, n, act, **o),
    "tied": lambda act, d, n, **o: sk.SAE(d, n, act, tied=True, pre_bias=False, **o),
    "matryoshka": lambda act, d, n, **o: sk.MatryoshkaSAE(
        d, n, act, prefixes=(n // 12, n // 3, n), weights=(1, 2, 0.5), **o
    ),
    "matryoshka-random": lambda act, d, n, **o: sk.MatryoshkaSAE(d, n, act, n_random=3, **o),
    "transcoder": lambda act, d, n, **o: sk.Transcoder(d, n, act, d_out=7, **o),
    "skip-transcoder": lambda act, d, n, **o: sk.Transcoder(d, n, act, d_out=7, skip=True, **o),
    "crosscoder": lambda act, d, n, **o: sk.Crosscoder(3, d // 3, n, act, **o),
    "cross-layer": lambda act, d, n, **o: sk.CrossLayerTranscoder(3, d // 3, n // 3, act, **o),
}

PAIRS = [
    (module, activation)
    for module in MODULES
    for activation in ACTIVATIONS
    if module != "cross-layer" or activation not in ("multi-topk", "gated")
]


class Kind(NamedTuple):
    """One class with one activation."""

    module: str
    activation: str

    def make(self, d=12, n=24, **options):
        if self.module == "cross-layer":  # has no AuxK
            options = {name: value for name, value in options.items() if not name.startswith("aux")}
        generator = torch.Generator().manual_seed(1)
        return MODULES[self.module](ACTIVATIONS[self.activation](), d, n, generator=generator, **options)

    @torch.no_grad()
    def perturbed(self, **options):
        """Off its start, as in the middle of training."""
        sae = self.make(**options)
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for act in self.activations_of(sae):
            if act.name == "jumprelu":
                act.length.fill_(1.5)
                act.relative_threshold.uniform_(-1.0, 1.0)
            if hasattr(act, "tokens_seen"):
                act.tokens_seen.fill_(50)
        return sae

    @staticmethod
    def activations_of(sae):
        return [part.activation for part in getattr(sae, "layers", [sae])]

    @staticmethod
    def batch(sae, rows, dtype=torch.float32):
        """Activations, whose sources differ in size, and a target, or None where the activations are it."""
        shape = (rows, sae.n_sources, sae.d_in // sae.n_sources) if sae.n_sources > 1 else (rows, sae.d_in)
        x = torch.randn(shape, dtype=dtype)
        if sae.n_sources > 1:
            x = x * torch.logspace(-1, 1, sae.n_sources, dtype=dtype).unsqueeze(1)
        other = isinstance(sae, sk.Transcoder | sk.CrossLayerTranscoder)
        return x, torch.randn(rows, *shape[1:-1], sae.d_out // sae.n_sources, dtype=dtype) if other else None


# Of the session, because hypothesis runs a test many times over with one fixture.
@pytest.fixture(params=[Kind(*pair) for pair in PAIRS], ids="-".join, scope="session")
def kind(request):
    """Runs a test once for every class with every activation."""
    return request.param


@pytest.fixture(params=ACTIVATIONS, scope="session")
def new_activation(request):
    """Runs a test once for every activation; makes it."""
    return ACTIVATIONS[request.param]
