"""Small ReLU networks that read the 8 × 8 digits of scikit-learn: ``python -m sparsekern.analysis.models.digits``.

Piecewise linear from the pixels to the logits, and small enough that every boundary of a polytope can be found.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekern.files import safetensors_bytes, write_atomically, write_json

KINDS = ("mlp", "conv")
SEEDS = (0, 1, 2)
WEIGHTS = Path(__file__).parent / "weights"

_EPOCHS, _BATCH, _LR = 60, 64, 2e-3


def digits_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels: ``[n, 64]`` float32 in 0 … 1, and ``[n]`` int64.

    Every fourth image is held out, which is the same on every machine.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long()
    held_out = torch.arange(len(images)) % 4 == 3
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def new_net(kind: str = "mlp") -> nn.Sequential:
    """An untrained network from images ``[n, 64]`` to logits ``[n, 10]``.

    "mlp" has three hidden layers of 64 units; "conv" two convolutions, each with ReLU and 2 × 2 max pooling, and one
    hidden layer of 64 units.

    Raises
    ------
    ValueError
        For another kind.
    """
    if kind == "mlp":
        widths = [64, 64, 64, 64]
        hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))
    if kind == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def digits_net(kind: str = "mlp", seed: int = 0) -> nn.Sequential:
    """A trained network, for evaluation.

    Raises
    ------
    ValueError
        If no such network comes with the package.
    """
    net = new_net(kind)
    if seed not in SEEDS:
        raise ValueError(f"seed must be one of {', '.join(map(str, SEEDS))}, got {seed!r}; train_net trains others")
    net.load_state_dict(load_file(WEIGHTS / f"digits-{kind}" / f"seed{seed}.safetensors"))
    return net.eval()


def train_net(kind: str = "mlp", seed: int = 0) -> nn.Sequential:
    """Train a network on the training images with Adam and a falling learning rate; a few seconds on one core."""
    images, labels, _, _ = digits_data()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = new_net(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module) -> tuple[float, float]:
    """Share of the training images, and of the held-out ones, that a network reads rightly."""
    images, labels, held_out, truth = digits_data()
    shares = [(net(x).argmax(1) == y).double().mean() for x, y in ((images, labels), (held_out, truth))]
    return float(shares[0]), float(shares[1])


def _baselines() -> dict[str, float]:
    """Held-out accuracy of what needs no network."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    images, labels, held_out, truth = (part.numpy() for part in digits_data())
    rivals: dict[str, Any] = {
        "nearest mean image": NearestCentroid(),
        "logistic regression": LogisticRegression(max_iter=2000),
        "nearest neighbour": KNeighborsClassifier(1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pixels that are 0 in all images of a digit
        return {name: float(rival.fit(images, labels).score(held_out, truth)) for name, rival in rivals.items()}


def main() -> None:
    """Train all kinds from all seeds and write their folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    output = parser.parse_args().output
    baselines = _baselines()
    for kind in KINDS:
        folder = output / f"digits-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        seeds = []
        for seed in SEEDS:
            net = train_net(kind, seed)
            write_atomically(folder / f"seed{seed}.safetensors", safetensors_bytes(net.state_dict()))
            training, held_out = accuracy(net)
            seeds.append({"seed": seed, "training": training, "held_out": held_out})
        write_json(folder / "training.json", {"seeds": seeds, "baselines": baselines, "torch": torch.__version__})
        write_atomically(folder / "README.md", _card(kind, seeds, baselines).encode())


def _card(kind: str, seeds: list[dict[str, Any]], baselines: dict[str, float]) -> str:
    parameters = sum(p.numel() for p in new_net(kind).parameters())
    ours = ", ".join(f"{entry['held_out']:.1%}" for entry in seeds)
    others = ", ".join(f"{name} {share:.1%}" for name, share in baselines.items())
    return f"""# digits-{kind}

A ReLU network of {parameters:,} parameters that reads the 8 × 8 digits of scikit-learn (Alpaydin & Kaynak 1998, UCI,
CC BY 4.0): `sparsekern.analysis.models.digits.digits_net("{kind}")`. Weights in float32 from {len(seeds)} seeds,
trained on a CPU in seconds.

- Held-out accuracy {ours}.
- Without a network: {others}.
- Held out is every fourth image; writers are in both parts.
- Made by `python -m sparsekern.analysis.models.digits`.

The weights are under the licence of sparsekern, Apache-2.0.
"""


if __name__ == "__main__":
    main()
