"""Pictures and pages of a training run: ``loss.png``, ``density.png``, ``features.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sparsekern import SAE
from sparsekern.analysis.latents import describe_latents
from sparsekern.data import ActivationStore
from sparsekern.files import write_atomically
from sparsekern.training import read_metrics


def write_report(folder: str | Path, store: ActivationStore, progress: bool = False) -> list[Path]:
    """Write the report of the finished run in `folder`, trained on `store`; returns the files, the page first.

    Imported activations have no tokens to show: then there is no ``features.md``.

    Raises
    ------
    ValueError
        If the run has not finished or matplotlib is missing.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds no summary.json: the run has not finished; resume it first")
    summary = json.loads((folder / "summary.json").read_text())
    density = load_file(folder / "density.safetensors")["density"]
    sae = SAE.from_pretrained(folder / "sae")
    written = []
    if (store.token_ids >= 0).any():
        page = describe_latents(sae, store, density, progress=progress)
        written.append(folder / "features.md")
        write_atomically(written[-1], page.encode())
    plot_loss(read_metrics(folder), summary, folder / "loss.png")
    plot_density(density, summary, folder / "density.png")
    return [*written, folder / "loss.png", folder / "density.png"]


def plot_loss(rows: list[dict[str, float]], summary: dict[str, Any], path: Path) -> None:
    """FVU against tokens, on training batches and held out, with the PCA bar."""
    figure, axes = _figure()
    from matplotlib.ticker import EngFormatter

    train = [row for row in rows if "fvu" in row]
    held_out = [row for row in rows if "heldout_fvu" in row]
    axes.plot([r["tokens"] for r in train], [r["fvu"] for r in train], lw=1, color="0.6", label="training batches")
    axes.plot([r["tokens"] for r in held_out], [r["heldout_fvu"] for r in held_out], "o-", color="C0", label="held out")
    if summary["pca_fvu"] is not None:
        label = f"PCA, {summary['pca_components']} components: {summary['pca_fvu']:.3f}"
        axes.axhline(summary["pca_fvu"], color="C3", ls="--", lw=1, label=label)
    axes.annotate(
        f"{summary['heldout_fvu']:.3f}",
        (held_out[-1]["tokens"], held_out[-1]["heldout_fvu"]),
        textcoords="offset points",
        xytext=(0, 9),
        ha="right",
        color="C0",
    )
    axes.set(xlabel="tokens", ylabel="fraction of variance unexplained", ylim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(f"{summary['sae']['d_sae']:,} latents on {summary['sae']['d_in']} dimensions", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_density(density: Tensor, summary: dict[str, Any], path: Path) -> None:
    """Histogram of the log density of the latents that fire; the silent ones are counted in the title."""
    figure, axes = _figure()
    logs = density[density > 0].log10()
    axes.hist(logs.numpy(), bins=40, color="C0")
    silent = int((density == 0).sum())
    axes.set(xlabel="log₁₀ share of held-out tokens on which a latent fires", ylabel="latents")
    axes.set_title(
        f"{len(logs):,} latents fire on {summary['heldout_tokens']:,} held-out tokens, {silent:,} do not", fontsize=10
    )
    figure.savefig(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need `pip install 'sparsekern[report]'`") from error
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
