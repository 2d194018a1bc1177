"""What is told of the language models: ``python -m sparsekern.analysis.models.report`` draws their loss curves.

It writes the cards anew from the records, ``training.json`` in each folder, and prints a table of all models.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sparsekern.analysis.models.architecture import CONTEXT, HEADS, HIDDEN, LAYERS, NGRAM_ORDER, SEPARATOR, VOCAB, WIDTH
from sparsekern.analysis.results import new_axes
from sparsekern.files import write_atomically

_WEIGHTS = Path(__file__).parent / "weights"
_MLPS = {"relu": "W_down relu(W_up x)", "swiglu": "W_down (silu(W_gate x) · W_up x)"}


def card(record: dict[str, Any]) -> str:
    """The model card."""
    held_out = record["held_out"]
    nats, ngrams = held_out["nats_per_token"], held_out["ngrams_nats_per_token"]
    best = min(ngrams, key=lambda order: ngrams[order])
    bits = nats / math.log(2) / held_out["characters_per_token"]
    mlp = _MLPS[record["kind"]]
    passes = record["tokens"] / record["text_tokens"]
    minutes, cpu_minutes = record["seconds"] / 60, record["cpu_seconds"] / 60
    rows = [
        f"| {name} | {source['version']} | {source['licence']} | {source['characters']:,} |"
        for name, source in record["sources"].items()
    ]
    sources = "\n".join(rows)
    return f"""# {record["name"]}

A causal language model for analyses of features: {record["parameters"]:,} parameters, {LAYERS} layers of width {WIDTH},
MLP `{mlp}` with {HIDDEN[record["kind"]]} hidden units, {HEADS} heads, RMSNorm, rotary positions, tied
embedding, {VOCAB:,} byte-level BPE tokens, contexts of {CONTEXT} tokens that begin with `{SEPARATOR}`. Weights in
float16. It knows the style of Python's documentation and little else.

- Trained on {record["tokens"]:,} tokens ({passes:.1f} times the text), seed {record["seed"]}, in {minutes:.0f} minutes
  ({cpu_minutes:.0f} of CPU time) on: {record["device"]}. It has not converged: more tokens would lower its loss.
- Held-out perplexity {math.exp(nats):.2f} a token ({bits:.3f} bits a character). Kneser–Ney n-grams of the same text:
  {math.exp(ngrams[best]):.2f} (order {best}, the best of 1 to {NGRAM_ORDER}). Held out are the docstrings of one file
  in 20.
- Loss curve and versions: `training.json`. Made by
  `python -m sparsekern.analysis.models.language {record["name"]} --seed {record["seed"]}`.

| text: docstrings of | version | licence | characters |
|---|---|---|---|
{sources}

The weights are under the licence of sparsekern, Apache-2.0.
"""


def table(records: list[dict[str, Any]]) -> str:
    """Perplexities of all models, as Markdown."""
    lines = [
        "| model | parameters | tokens | held-out perplexity | bits a character | n-grams |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        held_out = record["held_out"]
        nats = held_out["nats_per_token"]
        bits = nats / math.log(2) / held_out["characters_per_token"]
        best = math.exp(min(held_out["ngrams_nats_per_token"].values()))
        lines.append(
            f"| {record['name']} | {record['parameters']:,} | {record['tokens']:,} | {math.exp(nats):.2f} | "
            f"{bits:.3f} | {best:.2f} |"
        )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]]) -> Any:
    """Held-out loss over training of all models, and that of n-grams as lines; returns the axes.

    Along the way it is measured on the first held-out tokens only, which are harder than most: the end stands apart.
    """
    axes = new_axes(height=4.2)
    for color, record in enumerate(records):
        *curve, end = record["curve"]
        millions = [entry["tokens"] / 1e6 for entry in curve]
        axes.plot(millions, [entry["held_out"] for entry in curve], "-o", ms=3, color=f"C{color}", label=record["name"])
        axes.plot(end["tokens"] / 1e6, end["held_out"], "*", ms=9, color=f"C{color}")
    axes.plot([], [], "*", ms=9, color="0.4", label="all held-out text, as for the n-grams")
    for order, nats in records[0]["held_out"]["ngrams_nats_per_token"].items():
        if nats < records[0]["curve"][1]["held_out"]:  # what every model has passed soon is left out
            axes.axhline(nats, color="0.6", lw=0.8, ls="--")
            axes.annotate(f"{order}-grams", (1, nats), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xlabel("million tokens of training")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend(frameon=False)
    return axes


def main() -> None:
    """Write cards and picture, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="where to write the loss curves, as a PNG")
    arguments = parser.parse_args()
    records = []
    for path in sorted(_WEIGHTS.glob("docstrings-*/training.json")):
        records.append(json.loads(path.read_text()))
        write_atomically(path.with_name("README.md"), card(records[-1]).encode())
    print(table(records))
    if arguments.picture is not None:
        plot(records).figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
