"""The study of polytope codes: what pieces a model has, where they meet, and what latents have to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.polytope import (
    PolytopeCodes,
    SurrogateAgreement,
    neighbors,
    polytope_codes,
    surrogate_agreement,
)
from sparsekern.analysis.results import Result, markdown, new_axes, null_generator, samples
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.studies.options import PolytopeOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence
from sparsekern.analysis.studies.polytope_found import clusters, latents, made_of
from sparsekern.analysis.studies.polytope_lines import digits, lines
from sparsekern.analysis.studies.polytope_nets import Watched, of_rows
from sparsekern.analysis.studies.saes import TrainedSAEs, train_saes
from sparsekern.analysis.tokens import HeldOut
from sparsekern.bits import unpack_bits
from sparsekern.data import ActivationStore, load_model, shipped_models
from sparsekern.data.models import token_batches
from sparsekern.progress import Progress

_GATED = "docstrings-swiglu-0"
_PAIRS = 1000  # of tokens whose codes are compared
_ASKED = 1024  # tokens whose neighbours are looked up
_NEAREST = 5
_SURROGATE_CONTEXTS = 8
_GATED_TOKENS = 8192

SAME, BESIDE = "two occurrences of a token", "two tokens of a context"


def study(store: ActivationStore, options: PolytopeOptions, output: Path, progress: bool = True) -> list[Path]:
    """Compute codes of held-out tokens, hold them against the latents of SAEs, and write the page; returns its files.

    Raises
    ------
    ValueError
        If the store was not harvested from a model, the model has no activation modules, or the folder of the SAEs has
        some of other options.
    """
    options = options.resolved(store.d, output)
    new_axes()  # a missing matplotlib is found before the training, and so is a missing model
    held_out = HeldOut.of(store, options.held_out, options.seed, options.tokens)
    watched = Watched.of(Harvested.of(store, held_out), held_out, options.seed)
    trained = train_saes(store, options, progress)
    page = Page(output, "Which linear piece is a token in, and what do latents have to do with it?")
    _start(page, store, trained, watched, options)
    steps = [
        lambda: _codes(page, watched, options),
        lambda: _near(page, watched, options),
        lambda: _surrogates(page, watched, options),
        lambda: _gates(page, watched, options),
        lambda: digits(page, options),
        lambda: lines(page, watched, options),
        lambda: made_of(page, store, watched, options),
        lambda: latents(page, trained, watched, options),
        lambda: clusters(page, watched, options),
    ]
    with Progress("polytopes", len(steps), unit="sections", shown=progress) as bar:
        for done, step in enumerate(steps, start=1):
            step()
            bar.update(done)
    _end(page, watched)
    return page.write(options, store)


def _start(
    page: Page, store: ActivationStore, trained: TrainedSAEs, watched: Watched, options: PolytopeOptions
) -> None:
    units = ", ".join(f"{count:,}" for _, count in watched.codes.layers)
    kind = (
        "Its activation functions are smooth, so it has no pieces in the strict sense: the sign of what goes into a "
        "unit is a **surrogate**, which says on which side of 0 the unit is, not which linear map it belongs to."
        if watched.smooth
        else "Its activation functions are piecewise linear, so that with the attention patterns and the scales of the "
        "norms held fixed a code says which linear map the network applies."
    )
    related = (
        "the layers behind the activations of the store, whose input these are part of"
        if watched.behind
        else "all layers, since none lies behind the activations of the store"
    )
    page.text(
        "A network of linear maps and ReLUs cuts its input space into pieces (polytopes), and on each it is one linear "
        "map. Which units are on names the piece: one bit a unit, the **code** of a token. This page asks what codes "
        "say about tokens, where a straight line passes from one piece to the next, which units come and go together, "
        "and whether the latents of a sparse autoencoder can be read off the code.",
        trained.setting(store, options),
        f"- Codes: {watched.codes.n_units:,} units of {len(watched.layers)} layers ({units}). {kind}\n"
        f"- Latents are held against {related} ({', '.join(f'`{name}`' for name in watched.related)}).\n"
        "- **Untrained** is the same architecture with random weights, on the same tokens.",
        HOW_TO_READ,
    )
    page.section("The SAEs")
    page.table(*trained.table())


# What codes say about tokens


def _codes(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    page.section("What the code of a token looks like")
    held_out, codes = watched.held_out, watched.codes
    nets = {"trained": codes, "untrained": watched.untrained}
    looks = {name: [_look(some, layer) for layer in watched.layers] for name, some in nets.items()}
    page.table(
        ["layer", "units", "on", "bits a unit", "never or always on", "different codes", "of these, untrained"],
        (
            [
                f"`{name}`",
                f"{count:,}",
                f"{look['on']:.1%}",
                f"{look['bits']:.3f}",
                f"{look['constant']:.1%}",
                f"{look['distinct']:.1%}",
                f"{untrained['distinct']:.1%}",
            ]
            for (name, count), look, untrained in zip(codes.layers, looks["trained"], looks["untrained"], strict=True)
        ),
    )
    page.text(
        "*On*: mean share of the units. *Bits a unit*: entropy of a unit's on and off, 1 where it is on for half of "
        f"the tokens, mean over the units. *Different codes*: as a share of the {len(codes):,} tokens; 100% means that "
        "no two tokens are in one piece of that layer."
    )
    found = {
        name: distances(some, held_out.tokens, held_out.contexts, held_out.positions, options)
        for name, some in nets.items()
    }
    kinds = [kind for kind in (SAME, BESIDE) if found["trained"][kind]]
    if not kinds:
        page.text("The held-out tokens do not repeat often enough to compare pairs of them.")
        page.record(codes=looks)
        return
    page.table(
        ["layer", *(f"{kind}{extra}" for kind in kinds for extra in ("", ", untrained"))],
        (
            [f"`{layer}`", *(_beside(found[name][kind][index]) for kind in kinds for name in nets)]
            for index, layer in enumerate(watched.layers)
        ),
    )
    whole = [found["trained"][kind][-1] for kind in kinds]
    page.text(
        f"Share of the units of a layer in which the codes of two tokens differ, mean of {_PAIRS:,} pairs at most. "
        "*Two occurrences of a token* are in different contexts, *two tokens of a context* are different tokens. In "
        "brackets the smallest sample of two nulls, in which the second of each pair is replaced: by any token; and, "
        "to keep what else they have in common, by another token at about the same place of a context, or by the same "
        "token of another context. Over all layers:",
        markdown(whole),
        *(sentence(result) for result in whole),
    )
    page.picture("distances", _plot_distances(found, kinds, watched.layers), "Units in which two tokens differ")
    page.record(codes=looks, distances=found)


def _look(codes: PolytopeCodes, layer: str) -> dict[str, float]:
    one = codes.layer(layer)
    rate = one.unpack().double().mean(0)
    bits = -(torch.special.xlogy(rate, rate) + torch.special.xlogy(1 - rate, 1 - rate)) / torch.tensor(2.0).log()
    return {
        "on": float(rate.mean()),
        "bits": float(bits.mean()),
        "constant": float(((rate == 0) | (rate == 1)).double().mean()),
        "distinct": len({row.tobytes() for row in one.data.numpy()}) / len(one),
    }


def distances(
    codes: PolytopeCodes, tokens: Tensor, contexts: Tensor, positions: Tensor, options: PolytopeOptions
) -> dict[str, list[Result]]:
    """Differing units of pairs that have a token, or a context, in common: of each layer, then of all."""
    generator = null_generator(options.seed)
    place = (positions + 1).double().log2().floor().long()
    found: dict[str, list[Result]] = {}
    for kind, same, other, matched in ((SAME, tokens, contexts, place), (BESIDE, contexts, tokens, tokens)):
        a, b = _pairs(same, other, generator)
        keep = torch.bincount(matched)[matched[b]] > 1
        a, b = a[keep][:_PAIRS], b[keep][:_PAIRS]
        if len(a) == 0:
            found[kind] = []
            continue
        drawn: dict[str, list[Tensor]] = {"any token": [], _MATCHED[kind]: []}
        for _ in range(options.n_null):
            drawn["any token"].append(_differing(codes, a, torch.randint(len(codes), (len(b),), generator=generator)))
            drawn[_MATCHED[kind]].append(_differing(codes, a, _partners(matched, b, generator)))
        value = _differing(codes, a, b)
        names = [*(name for name, _ in codes.layers), "all layers"]
        found[kind] = [
            Result(
                f"share of units that differ between {kind}, {name}",
                float(value[index]),
                {null: samples(float(some[index]) for some in group) for null, group in drawn.items()},
                tail="less",
            )
            for index, name in enumerate(names)
        ]
    return found


_MATCHED = {SAME: "another token at about that place", BESIDE: "that token in another context"}


def _pairs(same: Tensor, other: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of rows of one group by `same` and of two by `other`, in random order."""
    order = torch.randperm(len(same), generator=generator)
    order = order[same[order].argsort(stable=True)]
    a, b = order[:-1], order[1:]
    kept = (same[a] == same[b]) & (other[a] != other[b])
    a, b = a[kept], b[kept]
    mixed = torch.randperm(len(a), generator=generator)
    return a[mixed], b[mixed]


def _partners(groups: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each row another one of its group, which has two at least."""
    order = groups.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    counts = torch.bincount(groups)
    start = (counts.cumsum(0) - counts)[groups[rows]]
    count = counts[groups[rows]]
    step = 1 + (torch.rand(len(rows), generator=generator) * (count - 1)).long()
    return order[start + (place[rows] - start + step) % count]


def _differing(codes: PolytopeCodes, a: Tensor, b: Tensor) -> Tensor:
    """Mean share of differing units of pairs of rows, of each layer and of all."""
    rates = unpack_bits(codes.data[a] ^ codes.data[b], codes.n_units).double().mean(0)
    parts = rates.split([count for _, count in codes.layers])
    return torch.stack([*(part.mean() for part in parts), rates.mean()])


def _beside(result: Result) -> str:
    least = min(float(numbers.min()) for numbers in result.nulls.values())
    return f"{result.value:.3f} ({least:.3f})"


def _plot_distances(found: dict[str, dict[str, list[Result]]], kinds: Sequence[str], layers: Sequence[str]) -> Any:
    axes = new_axes(7, 3.6)
    places = list(range(len(layers)))
    for kind, color in zip(kinds, ("C0", "C1"), strict=False):
        for net, style in (("trained", "o-"), ("untrained", "o:")):
            values = [result.value for result in found[net][kind][:-1]]
            axes.plot(places, values, style, color=color, ms=5, label=f"{kind}, {net}")
    for net, style in (("trained", "s-"), ("untrained", "s:")):
        values = [float(result.nulls["any token"].mean()) for result in found[net][kinds[0]][:-1]]
        axes.plot(places, values, style, color="0.45", ms=4, label=f"null: any two tokens, {net}")
    axes.set_xticks(places, [str(place) for place in places])
    axes.set(xlabel="layer", ylabel="share of units that differ", ylim=(0, 1.25 * axes.get_ylim()[1]))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return axes


def _near(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    """What the tokens of the nearest codes have in common."""
    page.section("What tokens of near codes have in common")
    held_out = watched.held_out
    n = len(held_out.x)
    generator = null_generator(options.seed + 1)
    asked = torch.randperm(n, generator=generator)[:_ASKED]
    k = min(_NEAREST, n - 2)
    found = {
        name: _others(neighbors(of_rows(some, asked), some, k + 1).indices.long(), asked)
        for name, some in (("codes", watched.codes), ("untrained codes", watched.untrained))
    }
    unit = torch.nn.functional.normalize(held_out.x - held_out.x.mean(0), dim=1)
    found["cosine of activations"] = _others((unit[asked] @ unit.T).topk(k + 1, dim=1).indices, asked)
    following = torch.where(held_out.contexts[1:] == held_out.contexts[:-1], held_out.tokens[1:], -1)
    labels = {
        "token": held_out.tokens,
        "next token": torch.cat([following, torch.tensor([-1])]),
        "context": held_out.contexts,
    }
    results = []
    for name, label in labels.items():
        known = label[asked] >= 0
        if not known.any():
            continue
        rows = asked[known]
        orders = [torch.randperm(n, generator=generator) for _ in range(options.n_null)]
        results.append(
            Result(
                f"share of the {k} nearest with the same {name}",
                _shared(label, rows, found["codes"][known]),
                {"tokens permuted": samples(_shared(label, rows, order[found["codes"][known]]) for order in orders)},
                {other: samples([_shared(label, rows, found[other][known])]) for other in list(found)[1:]},
            )
        )
    page.text(
        f"For {len(asked):,} random tokens the {k} others of all {n:,} whose codes differ in the fewest units, all "
        "layers taken together. Null: the neighbours replaced by random tokens. Controls: neighbours by codes of the "
        "untrained model, and by the cosine of the activations of the store about their mean.",
        markdown(results),
        *(sentence(result) for result in results),
    )
    page.record(near=results)


def _others(nearest: Tensor, asked: Tensor) -> Tensor:
    """Of k + 1 nearest those that are not the token itself, or the last one where all are other tokens."""
    own = nearest == asked[:, None]
    own[:, -1] |= ~own.any(1)
    return nearest[~own].view(len(asked), -1)


def _shared(label: Tensor, rows: Tensor, nearest: Tensor) -> float:
    return float((label[nearest] == label[rows][:, None]).double().mean())


# Activations without pieces


def _surrogates(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    page.section("What a sign leaves out")
    if not watched.smooth:
        page.text(
            "The activation functions of this model are piecewise linear: a sign says all about a unit's slope, and "
            "there is nothing to compare it with."
        )
        return
    found = _surrogate_table(page, watched, watched.harvested.model, watched.harvested.batches[0], options)
    contexts = len(watched.harvested.batches[0]["input_ids"][:_SURROGATE_CONTEXTS])
    page.text(
        f"On the tokens of {contexts} contexts. *Soft* is the slope of the activation function at the "
        "unit's input, from 0 (off) to 1 (on). *Agreement*: share of units with the sign that (soft > ½) says, which "
        "is 1 by construction for GELU and SiLU. *Correlation*: of sign and slope; in brackets the largest sample with "
        "the units permuted. *Graded*: share of the slopes between 0.1 and 0.9, of units that are neither on nor off."
    )
    page.record(surrogates=found.results)


def _surrogate_table(
    page: Page, watched: Watched, model: nn.Module, batch: dict[str, Tensor], options: PolytopeOptions
) -> SurrogateAgreement:
    """What a sign leaves out of a model's slopes, on the first contexts of a batch."""
    batch = {name: some[:_SURROGATE_CONTEXTS] for name, some in batch.items()}
    found = surrogate_agreement(
        model,
        watched.harvested.inputs(batch),
        n_null=options.n_costly,
        where=watched.harvested.rows(batch),
        seed=options.seed,
    )
    page.table(
        ["layer", "agreement", "correlation (null)", "graded"],
        (
            [
                f"`{layer}`",
                f"{found.results[f'agreement {layer}'].value:.4f}",
                f"{found.results[f'correlation {layer}'].value:.3f} "
                f"({float(found.results[f'correlation {layer}'].null.max()):.3f})",
                f"{found.results[f'graded {layer}'].value:.1%}",
            ]
            for layer in found.layers
        ),
    )
    return found


def _gates(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    """Gated units have two signs; of our gated model, where the store is of a model that reads as it does."""
    if not watched.harvested.causal or _GATED not in shipped_models():
        return
    page.section("Units with a gate")
    tokenizer, model = load_model(_GATED, causal=True)
    rows = []
    for batch in watched.harvested.batches:
        kept = watched.harvested.rows(batch)
        rows += [ids[some].tolist() for ids, some in zip(batch["input_ids"], kept, strict=True)]
    texts = [watched.harvested.tokenizer.decode(ids) for ids in rows]
    batches = token_batches(tokenizer, texts, 128, 4096, _GATED_TOKENS)
    parts, ids, contexts, positions, seen = [], [], [], [], 0
    for batch in batches:
        where = watched.harvested.rows(batch)
        parts.append(polytope_codes(model, watched.harvested.inputs(batch), kind="gate", where=where))
        ids.append(batch["input_ids"][where])
        context, position = where.nonzero(as_tuple=True)
        contexts.append(context + seen)
        positions.append(position)
        seen += len(where)
    codes = PolytopeCodes(torch.cat([part.data for part in parts]), parts[0].layers, "gate")
    found = distances(codes, torch.cat(ids), torch.cat(contexts), torch.cat(positions), options)
    looks = [_look(codes, name) for name, _ in codes.layers]
    page.table(
        ["layer", "on", "bits a unit", *(kind for kind, results in found.items() if results)],
        (
            [
                f"`{name}`",
                f"{looks[index]['on']:.1%}",
                f"{looks[index]['bits']:.3f}",
                *(_beside(results[index]) for results in found.values() if results),
            ]
            for index, (name, _) in enumerate(codes.layers)
        ),
    )
    surrogates = _surrogate_table(page, watched, model, batches[-1], options)
    page.text(
        f"`{_GATED}` on {len(codes):,} tokens of the same texts. A gated unit multiplies a smooth gate with a linear "
        "value, so it is quadratic rather than linear, and has two signs. Columns as above: the signs of gates and of "
        "values in the first table, and what the sign of a gate leaves out in the second."
    )
    page.record(gates={"looks": looks, "distances": found, "surrogates": surrogates.results})


def _end(page: Page, watched: Watched) -> None:
    page.section("What this cannot tell")
    page.text(
        "- A code says which units are on, not what the model does with them: two pieces may carry almost the same "
        "linear map, and one piece may hold very different outputs.\n"
        + (
            "- The model has smooth activation functions, so nothing here is about exact pieces of it; everything that "
            "is exact is about the small networks on digits.\n"
            if watched.smooth
            else "- Boundaries are those of one MLP alone. Attention is not piecewise linear, and what it would do "
            "along a segment was left out.\n"
        )
        + "- Tokens of one context are not independent. Discoveries are believed only beside those with whole contexts "
        "permuted, and p of nulls that permute single tokens is too small.\n"
        "- The best of thousands of units has a high AUC for a rare latent by chance; only the difference to the nulls "
        "counts. A latent that is read off one unit may still be made by many.\n"
        "- Components of a decomposition depend on how many are asked for. What they explain says nothing about "
        "whether the model uses them.\n"
        "- The untrained model is one draw of random weights. It shares the tokens, the positions and the "
        "architecture, so it is a hard control: what it has as well was not learned.\n"
        "- No published number exists for decompositions of codes, or for their relation to latents, that these could "
        "be held against."
    )
