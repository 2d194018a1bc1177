"""The study of a mixture of experts: what a SwitchSAE's experts have divided among themselves, as one page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import new_axes, plain, plot, samples, strip
from sparsekern.analysis.routing import (
    RouterGeometry,
    kmeans,
    router_geometry,
    with_duplicate,
)
from sparsekern.analysis.studies.moe_page import Page, leaf_name
from sparsekern.analysis.studies.options import MoeOptions
from sparsekern.analysis.studies.page import PAGE, RECORD
from sparsekern.analysis.tokens import HeldOut, over_represented
from sparsekern.analysis.toy import SubspaceClusters
from sparsekern.data import ActivationStore
from sparsekern.files import write_atomically, write_json
from sparsekern.progress import Progress
from sparsekern.training import versions

_ROUTER_TOKENS = 32768  # that the k-means router is fitted on
_NEVER = 2**62  # tokens after which a fixed router's row is moved


# Training


def train_arms(
    store: ActivationStore, options: MoeOptions, output: Path, device: str, progress: bool
) -> tuple[dict[str, sk.SAE], dict[str, dict[str, Any]]]:
    """Train the SwitchSAE and its controls on `store`; returns the modules and their summaries, by name of the arm."""
    assert options.latents is not None
    shape = {"n_experts": options.experts, "n_active": options.active_experts, "gate": options.gate}

    def switch(**more: Any) -> sk.SwitchSAE:
        return sk.SwitchSAE(
            store.d, options.latents, sk.TopK(options.k), **{**shape, **_common(options, device), **more}
        )

    def fixed(rows: Tensor | None) -> sk.SwitchSAE:
        sae = switch(balance="none", dead_expert_after=_NEVER, router_start="random")  # the rows stay what they are
        if rows is not None:
            sae.W_router.data.copy_(rows)
        sae.W_router.requires_grad_(False)
        sae.b_router.requires_grad_(False)
        return sae

    def plain_topk(latents: int) -> sk.SAE:
        return sk.SAE(store.d, latents, sk.TopK(options.k), **_common(options, device))

    small = options.latents // options.experts * options.active_experts
    makers: dict[str, Callable[[], sk.SAE]] = {"switch": lambda: switch(balance=options.balance)}
    if options.controls:
        other = "none" if options.balance != "none" else "loss"
        name = "switch, no balancing" if other == "none" else "switch, balanced by a loss"
        makers[name] = lambda: switch(balance=other)
        makers["switch, random start"] = lambda: switch(balance=options.balance, router_start="random")
        makers["fixed random router"] = lambda: fixed(None)
        makers["fixed k-means router"] = lambda: fixed(_kmeans_rows(store, options))
        makers[f"plain TopK, {small:,} latents"] = lambda: plain_topk(small)
        makers[f"plain TopK, {options.latents:,} latents"] = lambda: plain_topk(int(options.latents or 0))
    saes, summaries = {}, {}
    for name, make in makers.items():
        if progress:
            print(f"{name}:", file=sys.stderr, flush=True)
        folder = output / "runs" / name.replace(",", "").replace(" ", "-")
        result = sk.train(
            make(),
            store,
            progress=progress,
            output=folder,
            overwrite=True,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            held_out=options.held_out,
            seed=options.seed,
            eval_every=max(options.steps, 1),
            checkpoint_every=max(options.steps, 1),
            keep_checkpoints=1,
            eval_tokens=options.tokens,
        )
        saes[name], summaries[name] = result.sae, result.summary
    return saes, summaries


def _common(options: MoeOptions, device: str) -> dict[str, Any]:
    return {
        "dead_after": max(1, min(10_000_000, options.steps * options.batch_size // 4)),
        "generator": torch.Generator().manual_seed(options.seed),
        "device": device,
    }


def _kmeans_rows(store: ActivationStore, options: MoeOptions) -> Tensor:
    """Router rows ``[E, d]`` of k-means: means of the directions of training tokens, seen from their centre."""
    x = store.split(options.held_out, options.seed)[0].load(_ROUTER_TOKENS)
    return normalize(kmeans(normalize(x - x.mean(0), dim=1), options.experts, options.seed)[1], dim=1)


class ToyRun(NamedTuple):
    """A training on :class:`~sparsekern.analysis.toy.SubspaceClusters`.

    Attributes
    ----------
    sae : SwitchSAE
    geometry : RouterGeometry
        On fresh tokens, with the labels ``cluster``.
    fvu : float
        On the same tokens.
    """

    sae: sk.SwitchSAE
    geometry: RouterGeometry
    fvu: float


def train_on_toy(
    seed: int, *, start: str = "kmeans", steps: int = 1500, n_null: int = 20, n_costly: int = 5, **options: Any
) -> ToyRun:
    """Train a SwitchSAE of 4 experts × 16 latents on 4 clusters × 16 features, and measure it on 4,096 fresh tokens.

    The features, the weights and the tokens all follow from `seed`. `start` is where the router starts: "kmeans" or
    "random", which are the SwitchSAE's own, or "axes": at the clusters' axes, where it makes no mistake. `options` are
    the others of the SwitchSAE.
    """
    generator = torch.Generator().manual_seed(seed)
    toy = SubspaceClusters(generator=generator)
    sae = sk.SwitchSAE(
        toy.d,
        len(toy.features),
        sk.TopK(toy.active),
        n_experts=toy.clusters,
        router_start="random" if start == "axes" else start,
        generator=generator,
        **options,
    )
    if start == "axes":
        sae.W_router.data.copy_(toy.axes)
    trainer = sk.Trainer(sae, lr=1e-3, steps=steps)
    for _ in range(steps):
        trainer.step(toy.sample(256, generator)[1])
    sae.eval()
    activations, x = toy.sample(4096, generator)
    labels = {"cluster": toy.clusters_of(activations)}
    geometry = router_geometry(sae, x, labels, n_null=n_null, n_costly=n_costly, seed=seed)
    return ToyRun(sae, geometry, sk.evaluate(sae, [x]).fvu)


# The study


def study(store: ActivationStore, options: MoeOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load, measure, and write ``page.md``, its pictures and ``results.json`` into `output`; returns them.

    Raises
    ------
    ValueError
        If the SAE to study is no SwitchSAE or of another width, and for options that do not fit together.
    """
    options = options.resolved(store.d)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    new_axes()  # a missing matplotlib is found before the training
    held_out = HeldOut.of(store, options.held_out, options.seed, options.tokens)
    labels = held_out.labels()
    output.mkdir(parents=True, exist_ok=True)
    if options.sae is None:
        arms, summaries = train_arms(store, options, output, device, progress)
    else:
        arms, summaries = {"switch": sk.SwitchSAE.from_pretrained(options.sae, device=device)}, {}
    main = arms["switch"]
    if not isinstance(main, sk.SwitchSAE) or main.d_in != store.d:
        raise ValueError(f"sae must be a SwitchSAE of width {store.d}, got {type(main).__name__} of width {main.d_in}")
    geometry = router_geometry(
        main,
        held_out.x,
        labels,
        n_null=options.n_null,
        n_costly=options.n_costly,
        seed=options.seed,
        progress=progress,
    )
    table = _compare(arms, geometry, held_out, labels, progress)
    tokens = [over_represented(geometry.experts, held_out.tokens, e) for e in range(main.n_experts)]
    shuffled = geometry.experts[torch.randperm(len(held_out.x), generator=torch.Generator().manual_seed(options.seed))]
    chance = [over_represented(shuffled, held_out.tokens, e) for e in range(main.n_experts)]
    toys = _toys(options, progress) if options.toy else {}

    written = {"loads": geometry.plot_loads().figure}
    agreements = [result for key, result in geometry.results.items() if key.startswith("ami_")]
    if agreements:
        written["agreement"] = plot(agreements)
    written["measures"] = plot([r for key, r in geometry.results.items() if not key.startswith("ami_")])
    if len(geometry.tree):
        names = [leaf_name(e, tokens[e], store) for e in range(main.n_experts)]
        written["tree"] = geometry.plot_tree(names=names).figure
        written["similarities"] = geometry.plot_similarities().figure
    if toys:
        written["toy"] = _plot_toys(toys)
    for name, figure in written.items():
        figure.savefig(output / f"{name}.png")

    page = Page(
        store, options, main, held_out, geometry, table, tokens, chance, _toy_rows(toys, options.seed), set(written)
    )
    write_atomically(output / PAGE, page.text().encode())
    record = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in options.to_dict().items()},
        "store": store.source,
        "sae": main.config(),
        "geometry": geometry.to_dict(),
        "arms": table,
        "summaries": summaries,
        "over_represented": [[token._asdict() for token in found] for found in tokens],
        "toy": {name: [{"fvu": run.fvu, **run.geometry.to_dict()} for run in runs] for name, runs in toys.items()},
        "versions": versions(),
    }
    write_json(output / RECORD, plain(record))
    return [output / PAGE, *(output / f"{name}.png" for name in written), output / RECORD]


def _compare(
    arms: dict[str, sk.SAE], geometry: RouterGeometry, held_out: HeldOut, labels: dict[str, Tensor], progress: bool
) -> dict[str, dict[str, float]]:
    """A few measures of every arm, on the same tokens."""
    table = {}
    with Progress("arms", len(arms), unit="arms", shown=progress) as bar:
        for done, (name, sae) in enumerate(arms.items()):
            evaluation = sk.evaluate(sae, held_out.x.split(2048))
            row = {"fvu": evaluation.fvu, "silent": evaluation.silent_fraction}
            if isinstance(sae, sk.SwitchSAE):
                found = geometry
                if name != "switch":  # its nulls are not shown
                    found = router_geometry(sae, held_out.x, labels, n_null=1, n_costly=1)
                row |= {key: result.value for key, result in found.results.items()}
            else:
                unit = normalize(sae.W_dec.detach().cpu().float()[evaluation.density > 0], dim=1)
                one = torch.zeros(1, len(unit), dtype=torch.int64)
                row["duplicates_within"] = float(with_duplicate(unit, one, 0.9)[0, 0].double().mean())
            table[name] = row
            bar.update(done + 1)
    return table


def _toys(options: MoeOptions, progress: bool) -> dict[str, list[ToyRun]]:
    """The toy for some seeds: with balancing, without, and from other starts of the router."""
    steps = 100 if options.quick else 1500
    kinds: dict[str, dict[str, Any]] = {
        "balanced by a loss": {"balance": "loss", "gate": options.gate},
        "no balancing": {"balance": "none", "gate": options.gate},
        "balanced, random start": {"balance": "loss", "gate": options.gate, "start": "random"},
        "balanced, started at the axes": {"balance": "loss", "gate": options.gate, "start": "axes"},
    }
    toys: dict[str, list[ToyRun]] = {name: [] for name in kinds}
    with Progress("toy", len(kinds) * options.toy_seeds, unit="trainings", shown=progress) as bar:
        for done in range(len(kinds) * options.toy_seeds):
            seed, kind = divmod(done, len(kinds))
            name = list(kinds)[kind]
            toys[name].append(train_on_toy(options.seed + seed, steps=steps, **kinds[name]))
            bar.update(done + 1)
    return toys


def _toy_rows(toys: dict[str, list[ToyRun]], first_seed: int) -> list[list[str]]:
    """A row of the page's table for each training."""
    rows = []
    for name, runs in toys.items():
        for seed, run in enumerate(runs, start=first_seed):
            results = run.geometry.results
            ami = results["ami_cluster"]
            loads = ", ".join(f"{share:.0%}" for share in (run.geometry.loads / run.geometry.loads.sum()).tolist())
            beside = [*ami.controls.values(), *ami.nulls.values()]
            numbers = [f"**{ami.value:.3f}**", *(f"{group.mean():.3f}" for group in beside), f"{run.fvu:.3f}"]
            rows.append([name, str(seed), *numbers, loads, f"{results['duplicates_across'].value:.1%}"])
    return rows


def _plot_toys(toys: dict[str, list[ToyRun]]) -> Any:
    """Agreement with the clusters: a dot for each training, beside the nulls and k-means of all of them."""
    axes = new_axes(7.5, 3)
    found = {name: [run.geometry.results["ami_cluster"] for run in runs] for name, runs in toys.items()}
    groups = {name: (samples(result.value for result in results), "C0") for name, results in found.items()}
    every = [result for results in found.values() for result in results]
    for name in every[0].nulls:
        groups[name] = (torch.cat([result.nulls[name] for result in every]), "0.45")
    for name in every[0].controls:
        groups[name] = (torch.cat([result.controls[name] for result in every]), "C1")
    strip(axes, groups)
    axes.set_xlabel("agreement of experts with the true clusters (AMI)")
    axes.set_xlim(-0.05, 1.05)
    return axes.figure
