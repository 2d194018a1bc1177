"""The part of the study of polytope codes about what codes are made of, and what latents have to do with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.models.digits import SEEDS, digits_data, digits_net
from sparsekern.analysis.polytope import (
    CodeFeatureRelation,
    Decomposition,
    DistanceComparison,
    PolytopeCodes,
    cluster_codes,
    code_feature_relation,
    compare_distances,
    decompose_codes,
    polytope_codes,
    pulled_directions,
    shared_examples,
    similarity,
)
from sparsekern.analysis.results import Result, markdown, new_axes, plot
from sparsekern.analysis.studies.options import PolytopeOptions
from sparsekern.analysis.studies.page import Page, sentence, token_text
from sparsekern.analysis.studies.polytope_nets import Watched, of_layers, of_rows
from sparsekern.analysis.studies.saes import TrainedSAEs
from sparsekern.bits import pack_bits
from sparsekern.data import ActivationStore

_METHODS = {"pca": "PCA", "ica": "ICA", "nmf": "NMF", "sae": "SAE"}
_DECOMPOSED = 2048  # tokens
_SAE_STEPS = 200
_SHOWN = 8  # components told by their words
_STRONGEST = 12  # tokens of a component whose words are told
_LATENTS = 256  # latents that are held against every unit
_TOP = 20  # examples of a component, and of a latent
_LABEL_COUNT = 10  # occurrences of a token that is a label


def made_of(page: Page, store: ActivationStore, watched: Watched, options: PolytopeOptions) -> None:
    """Decompositions of the codes, and what the parts are active on."""
    page.section("Which units come and go together")
    codes, untrained = (of_layers(some, watched.related) for some in (watched.codes, watched.untrained))
    n = min(_DECOMPOSED, len(codes))
    codes, untrained = of_rows(codes, slice(n)), of_rows(untrained, slice(n))
    rank = min(options.rank, n, codes.n_units)
    found: dict[str, Decomposition] = {}
    for method, name in _METHODS.items():
        found[name] = decompose_codes(
            codes,
            method,
            rank,
            control={"untrained": untrained},
            k=min(4, rank),
            starts=1,
            steps=20 if options.quick else _SAE_STEPS,
            n_null=options.n_costly,
            seed=options.seed,
        )
    results = {name: one.results["explained"] for name, one in found.items()}
    best = max(results, key=lambda name: round(results[name].value, 3))  # ICA explains what PCA does
    page.text(
        f"The codes of {n:,} tokens ({', '.join(f'`{name}`' for name in watched.related)}) as sums of {rank} patterns "
        f"of units, by four methods. *Explained* is the share of the codes' variance about their mean. Null: every "
        f"unit permuted over the tokens, which keeps how often it is on, and decomposed again ({options.n_costly} "
        "samples). Control: the codes of the untrained model.",
        markdown(results.values()),
        f"{best} explains most, {results[best].value:.1%}; "
        + _more(results[best].value, float(results[best].controls["untrained"].mean()), "the untrained model's codes")
        + ". Parts that never subtract, as those of NMF, are the easiest to read; some of them, evenly spaced by "
        "strength, with the tokens on which they are strongest:",
    )
    nmf = found["NMF"]
    assert isinstance(nmf.scores, Tensor)
    page.table(
        ["component", f"its {_STRONGEST} strongest tokens, and how often each", "share of its squares in each layer"],
        (
            [str(index), _words(store, watched, nmf.scores[:, index]), _shares(nmf, index)]
            for index in torch.linspace(0, rank - 1, min(_SHOWN, rank)).round().long().tolist()
        ),
    )
    page.picture("decompositions", plot(results.values()), "What components explain, beside nulls and the control")
    page.record(decompositions=results)


def _more(value: float, other: float, what: str) -> str:
    return f"{'more' if value > other else 'less'} than of {what}, {other:.1%}"


def _words(store: ActivationStore, watched: Watched, scores: Tensor) -> str:
    tokens = watched.held_out.tokens[scores.topk(min(_STRONGEST, len(scores))).indices]
    words = [token_text(store, token) for token in tokens.tolist()]
    return ", ".join(f"`{word}` ×{count}" for word, count in Counter(words).most_common(4))


def _shares(found: Decomposition, index: int) -> str:
    return ", ".join(f"{share:.0%}" if share == share else "–" for share in found.layer_shares()[index].tolist())


# Latents


def latents(page: Page, trained: TrainedSAEs, watched: Watched, options: PolytopeOptions) -> None:
    """Codes held against the latents of every SAE."""
    page.section("Whether a unit tells when a latent is active")
    n = min(options.related, len(watched.codes))
    codes = of_rows(of_layers(watched.codes, watched.related), slice(n))
    control = {"untrained": of_rows(of_layers(watched.untrained, watched.related), slice(n))}
    before = [name for name in watched.layers if name not in watched.related]
    if before:
        control["layers before"] = of_rows(of_layers(watched.codes, before), slice(n))
    x, contexts = watched.held_out.x[:n], watched.held_out.contexts[:n]
    control["signs of principal components"] = _principal(x)
    components = max(1, min(16, n // 8 - 2))
    every, found, whole = [], [], []
    for width, group in trained.by_width.items():
        for one in group:
            some = _of_tokens(one.codes, n)
            chosen = one.density.argsort(descending=True, stable=True)
            chosen = chosen[one.density[chosen] * len(one.codes.values) >= 10]
            spaced = torch.linspace(0, len(chosen) - 1, min(_LATENTS, len(chosen))).long()
            every.append((f"{width:,}, seed {one.seed}", one, some))
            found.append(
                code_feature_relation(
                    codes,
                    some,
                    latents=chosen[spaced],
                    contexts=contexts,
                    control=control,
                    components=components,
                    n_null=options.n_costly,
                    seed=options.seed,
                )
            )
            whole.append(
                similarity(codes, some, contexts=contexts, control={"activations": x}, components=components, n_null=0)
            )
    first = found[0]
    page.text(
        f"{n:,} tokens. A bit that is on in a share of the tokens where a latent is active and in another share of the "
        "rest has an AUC of ½ + ½ (their difference); a pair of latent and unit is *discovered* by a hypergeometric "
        "test at a false discovery rate of 5% over the units of a latent. Latents: "
        f"{len(first.latents)} of each SAE, evenly spaced by frequency among those that are active on 10 tokens at "
        "least. Nulls: the latents' tokens permuted, and whole contexts permuted, which keeps what tokens of a context "
        "have in common. CKA and CCA compare all units with all latents at once.",
    )
    names = {
        "best_auc": "AUC of the best unit",
        "discovered": "pairs discovered",
        "found": "latents with a discovery",
        "cka": "CKA",
        "cca": "CCA",
    }
    page.table(
        ["SAE", *names.values()],
        ([name, *(_cell(one.results[key]) for key in names)] for (name, _, _), one in zip(every, found, strict=True)),
    )
    page.text("In brackets the largest sample of the nulls. The first SAE beside each null and control:")
    page.text(markdown(first.results.values()), *(sentence(first.results[key]) for key in ("best_auc", "discovered")))
    told = ", ".join(f"{_value(one, 'activations', 'cka'):.2f}" for one in whole)
    page.text(
        f"The activations themselves, which the latents were made from, have a CKA of {told} with them. "
        + _signs(first)
    )
    page.picture("aucs", _plot_aucs(first), "AUC of the best unit of each latent, first SAE, beside nulls")
    page.record(relations={name: one.results for (name, _, _), one in zip(every, found, strict=True)}, cka=whole)
    _directions(page, watched, codes, contexts, every, options)


def _value(found: dict[str, Result], control: str, key: str) -> float:
    return float(found[key].controls[control].mean())


def _signs(found: CodeFeatureRelation) -> str:
    off = float((found.best_sign < 0).double().mean())
    return f"For {off:.0%} of its latents the best unit is off where the latent is active."


def _cell(result: Result) -> str:
    most = [float(numbers.max()) for numbers in result.nulls.values() if len(numbers)]
    return f"{result.value:.3f} ({f'{max(most):.3f}' if most else '–'})"


def _of_tokens(codes: sk.SparseCodes, n: int) -> sk.SparseCodes:
    return codes._replace(values=codes.values[:n], indices=codes.indices[:n])


def _principal(x: Tensor) -> PolytopeCodes:
    """Signs of the principal components of activations, as codes."""
    centred = x - x.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh
    return PolytopeCodes(pack_bits(centred @ directions.T > 0), (("components", len(directions)),), "sign")


def _plot_aucs(found: CodeFeatureRelation) -> Any:
    axes = new_axes(7, 3.4)
    bins = torch.linspace(0.5, 1, 51).tolist()
    axes.hist(found.best_auc.tolist(), bins=bins, color="C0", label="best unit")
    for (name, drawn), color in zip(found.null_best.items(), ("0.3", "0.6"), strict=False):
        axes.hist(drawn[0].tolist(), bins=bins, histtype="step", color=color, lw=1.5, label=f"null: {name}")
    axes.set(xlabel="AUC of the best unit", ylabel="latents", xlim=(0.5, 1))
    axes.legend(frameon=False)
    return axes


def _directions(
    page: Page, watched: Watched, codes: PolytopeCodes, contexts: Tensor, every: list[Any], options: PolytopeOptions
) -> None:
    """Components pulled back to the activations, and examples that they share with latents."""
    page.section("Whether parts of the code are latents")
    n = min(_DECOMPOSED, len(codes))
    rank = min(options.rank, n, codes.n_units)
    made = decompose_codes(of_rows(codes, slice(n)), "nmf", rank, n_null=0, seed=options.seed)
    assert isinstance(made.scores, Tensor)
    results: dict[str, dict[str, Result]] = {}
    kept = made.components.any(1)
    top = min(_TOP, n // 4)
    for name, _, some in every:
        results[name] = shared_examples(
            made.scores[:, kept],
            _of_tokens(some, n),
            top,
            contexts=contexts[:n],
            n_null=options.n_null,
            seed=options.seed,
        ).results
    page.text(
        f"The {int(kept.sum())} components that NMF finds in the codes of {n:,} tokens, held against latents in two "
        "ways. **Shared examples**: the largest share of the "
        f"{top} tokens on which a component is strongest that are among the {top} of one latent."
    )
    if watched.behind:
        batch = {name: some[: options.pulled] for name, some in watched.harvested.batches[0].items()}
        for place, (name, one, _) in enumerate(every):
            results[name] |= pulled_directions(
                watched.harvested.model,
                watched.harvested.inputs(batch),
                made.components[kept],
                one.sae.W_dec.detach(),
                layers=watched.related,
                at=watched.harvested.hook,
                where=watched.harvested.rows(batch),
                n_null=options.n_costly if place == 0 else 0,
                seed=options.seed,
            ).results
        page.text(
            "**Pulled directions**: the direction of the activations in which a step raises the units of a component "
            f"most, by the transposed Jacobian, averaged over the tokens of {len(batch['input_ids'])} contexts; the "
            "largest absolute cosine with a decoder row. Nulls: the entries of a component permuted within layers, and "
            "random rows with the second moment of the decoder. *Constancy* is 1 if a component has the same direction "
            "at every token."
        )
    else:
        page.text("Directions cannot be pulled back: no layer reads the activations of the store.")
    keys = list(results[every[0][0]])
    titles = {
        "overlap": "shared examples",
        "cosine": "cosine of pulled directions",
        "each": "at single tokens",
        "constancy": "constancy",
    }
    page.table(
        ["SAE", *(titles[key] for key in keys)],
        ([name, *(_cell(group[key]) for key in keys)] for name, group in results.items()),
    )
    first = results[every[0][0]]
    page.text(
        "In brackets the largest sample of the nulls, for pulled directions of the first SAE.", markdown(first.values())
    )
    page.text(*(sentence(first[key]) for key in keys))
    page.record(parts=results)


# Groups


def clusters(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    """Groups of tokens by their codes, and which distance tells tokens and digits apart."""
    page.section("Whether near codes are the same token")
    held_out = watched.held_out
    known, counts = held_out.tokens[held_out.tokens >= 0].unique(return_counts=True)
    frequent = known[counts.argsort(descending=True, stable=True)[:50]]
    rows = torch.isin(held_out.tokens, frequent).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(options.seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[: options.clustered]]
    codes = of_rows(of_layers(watched.codes, watched.related), rows)
    labels = held_out.tokens[rows]
    groups = cluster_codes(codes, labels, n_null=options.n_null, n_refit=options.n_costly, seed=options.seed)
    page.text(
        f"{len(rows):,} random occurrences of the {len(frequent)} most frequent tokens. HDBSCAN by the Hamming "
        f"distance of their codes finds {len(groups.sizes)} clusters; *share with the label of their cluster* is how "
        "much of a cluster is one token.",
        markdown(groups.results.values()),
        *(sentence(groups.results[key]) for key in ("clustered", "purity", "ami")),
    )
    compared = compare_distances(
        codes, {"activations": held_out.x[rows]}, labels, n_null=options.n_null, seed=options.seed
    )
    page.text("**Which distance tells tokens apart?** The same tokens, their identity as label:")
    _distance_table(page, {"": compared})
    read = _digits(options)
    page.text("**And digits?** The held-out images, for the networks of above; one network after the other:")
    _distance_table(page, read)
    page.text(
        "*Neighbours*: share of samples that have the label of most of their five nearest. *Silhouette* of the labels. "
        "*AMI* of the labels with as many clusters by average linkage. In brackets the largest sample with the labels "
        "permuted.",
        _winner(compared, "tokens"),
        *(_winner(one, f"digits, {name}") for name, one in read.items()),
    )
    page.record(
        clusters=groups.results,
        compared=compared.results,
        compared_digits={name: one.results for name, one in read.items()},
    )


def _digits(options: PolytopeOptions) -> dict[str, DistanceComparison]:
    _, _, images, truth = digits_data()
    images, truth = images[: options.clustered], truth[: options.clustered]
    found = {}
    for seed in SEEDS[:1] if options.quick else SEEDS:
        net = digits_net(seed=seed)
        with torch.no_grad():
            hidden = net[:-1](images)
        found[f"seed {seed}"] = compare_distances(
            polytope_codes(net, images),
            {"pixels": images, "last hidden layer": hidden},
            truth,
            n_null=options.n_null,
            seed=options.seed,
        )
    return found


def _distance_table(page: Page, found: dict[str, DistanceComparison]) -> None:
    first = next(iter(found.values()))
    measures = {"knn": "neighbours", "silhouette": "silhouette", "ami": "AMI"}

    def cell(distance: str, key: str) -> str:
        results = [one.results[f"{key}, {distance}"] for one in found.values()]
        null = max(float(result.null.max()) for result in results)
        return f"{', '.join(f'{result.value:.3f}' for result in results)} ({null:.3f})"

    page.table(
        ["distance", *measures.values()],
        ([distance, *(cell(distance, key) for key in measures)] for distance in first.distances),
    )


def _winner(found: DistanceComparison, what: str) -> str:
    table = found.table()
    of_codes = [name for name in found.distances if name.endswith(" of codes")]
    told = []
    for key, name in (("knn", "neighbours"), ("silhouette", "silhouette"), ("ami", "AMI")):
        best = max(found.distances, key=lambda distance: table[distance][key])
        better = table["jaccard of codes"][key] > table["hamming of codes"][key]
        told.append(
            f"by {name} {best} is best{'' if best in of_codes else ', not a distance of codes'}, and Jaccard is "
            f"{'better' if better else 'no better'} than Hamming"
        )
    return f"{what[:1].upper()}{what[1:]}: {'; '.join(told)}."
