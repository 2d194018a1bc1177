"""The command line. A command is a class of options and a function that takes it.

Flags and config files share the class: flags are made from its fields, a config file sets the same names, and both are
validated in one place. A flag wins over the file.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

import sparsekern as sk
from sparsekern.analysis.studies.options import (
    CanonicalOptions,
    CompletenessOptions,
    GeometryOptions,
    MoeOptions,
    OpposingOptions,
    PlateausOptions,
    PolytopeOptions,
    SplittingOptions,
    ToyOptions,
)
from sparsekern.bench.options import BenchOptions
from sparsekern.data import (
    EMBEDDED_MODEL,
    ActivationStore,
    JoinedStore,
    harvest,
    import_activations,
    load_model,
    read_texts,
    token_batches,
)
from sparsekern.data.models import check_context_length
from sparsekern.files import write_json
from sparsekern.hooks import named_module
from sparsekern.modules.activations import ACTIVATIONS, Activation
from sparsekern.options import Options, option
from sparsekern.progress import Progress
from sparsekern.training import TrainConfig, loss_recovered, versions

app = typer.Typer(
    name="sparsekern",
    help="A custom-kernel engine for sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
studies = typer.Typer(
    name="study",
    help="Look at trained SAEs from one side, beside what chance gives: a page with pictures, and all numbers as JSON.",
    no_args_is_help=True,
)
app.add_typer(studies)
out = Console()

T = TypeVar("T", bound=Options)

_MODEL_BATCH = 512  # tokens that run through a language model at a time: each has as many logits as the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestOptions(Options):
    """Options of ``sparsekern harvest``."""

    model: str = option(EMBEDDED_MODEL, "embedded model, folder, or Hugging Face id")
    hook: str | None = option(None, "module whose output is stored, e.g. encoder.layer.3; by default a middle block")
    texts: list[Path] | None = option(None, "text files or folders; by default the standard library's docstrings")
    activations: Path | None = option(None, "instead of running a model: a folder of .npy or .safetensors activations")
    dtype: str = option("float32", "of the numbers on disk", choices=("float32", "float16", "bfloat16"))
    context_length: int = option(128, "longest context", unit="tokens", at_least=3)
    batch_tokens: int = option(4096, "run at a time, padding included", unit="tokens", at_least=1)
    shard_tokens: int = option(65536, "size of a shard", unit="tokens", at_least=1)
    drop_special: bool = option(True, "leave special tokens such as [CLS] out")
    max_tokens: int | None = option(None, "stop after as many", unit="tokens", at_least=1)
    device: str | None = option(None, "where the model runs; by default a GPU if there is one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Options of ``sparsekern train``."""

    expansion: int = option(64, "latents as a multiple of the width of the activations", at_least=1)
    latents: int | None = option(None, "latents; wins over the expansion", at_least=1)
    activation: str = option("topk", "what keeps codes sparse", choices=tuple(ACTIVATIONS))
    k: int = option(32, "active latents a token; for jumprelu the L0 that it is trained for", at_least=1)
    multi_k: int | None = option(None, "topk: the Multi-TopK loss with so many latents, e.g. 4k", at_least=1)
    l1_coefficient: float | None = option(None, "relu, gated: weight of the L1 penalty", at_least=0)
    p: float | None = option(None, "relu: power of the penalty, below 1 for L_p", above=0, at_most=1)
    l0_coefficient: float | None = option(None, "jumprelu: weight of the L0 penalty, instead of a target", at_least=0)
    bandwidth: float | None = option(None, "jumprelu: of the straight-through estimators", above=0)
    penalty_warmup: int = option(0, "relu, gated, jumprelu: the penalty rises over so many", unit="steps", at_least=0)
    tied: bool = option(False, "one parameter for encoder and decoder")
    matryoshka: bool = option(False, "prefixes of the latents must reconstruct too (MatryoshkaSAE)")
    skip: bool = option(False, "with --target: an affine path around the latents")
    experts: int = option(
        1, "of a mixture; with more than 1 a router sends each token to some of them (SwitchSAE)", at_least=1
    )
    active_experts: int = option(1, "experts a token", at_least=1)
    balance: str = option("loss", "what keeps experts evenly loaded", choices=("loss", "bias", "none"))
    aux_coefficient: float | None = option(
        None, "weight of the AuxK loss, 0 for none; by default 1/32, and 0 for relu, gated, jumprelu", at_least=0
    )
    aux_k: int | None = option(None, "dead latents a token may use in AuxK; by default half the width", at_least=1)
    dead_after: int | None = option(
        None,
        "without firing, a latent counts as dead; by default 10 million or a quarter of the run, whichever is less",
        unit="tokens",
        at_least=1,
    )
    device: str | None = option(None, "where to train; by default a GPU if there is one")
    report: bool = option(True, "write plots and features.md at the end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Options of ``sparsekern eval``."""

    held_out: float = option(
        0.05, "share of the contexts measured, split as in training; 1 for all", above=0, at_most=1
    )
    seed: int = option(0, "seed of the split; the one of the training run for tokens it has not seen", at_least=0)
    max_tokens: int = option(65536, "tokens measured, at most", unit="tokens", at_least=2)
    batch_size: int = option(2048, "tokens at a time", unit="tokens", at_least=1)
    model: str | None = option(
        None, "causal language model, folder or Hugging Face id: measures the loss recovered in it too"
    )
    hook: str | None = option(None, "module of the model whose output is replaced; by default the store's")
    texts: list[Path] | None = option(
        None, "text files or folders for the model; by default the measured contexts, if the store is of this model"
    )
    context_length: int = option(128, "longest context of the model", unit="tokens", at_least=3)
    model_tokens: int = option(8192, "run through the model, about", unit="tokens", at_least=2)
    device: str | None = option(None, "where to run; by default a GPU if there is one")


# From a class of options to flags


def parse(cls: type[T], given: dict[str, Any]) -> T:
    """Build options from a config file's or a command line's values, with types coerced and everything checked."""
    for key in given:
        cls.check_name(key)
    try:
        return pydantic.TypeAdapter(cls).validate_python(given)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {reason}, got {problem['input']!r}" if where else reason) from error


def read_config(path: Path | None) -> dict[str, Any]:
    """The options in a YAML or TOML file; none without a file."""
    if path is None:
        return {}
    readers = {".toml": _read_toml, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix not in readers:
        raise ValueError(f"config {path} must end in {', '.join(readers)}")
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    try:
        content = readers[path.suffix](text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path} must hold `name: value` pairs")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _read_yaml(text: str) -> Any:
    return yaml.safe_load(text) or {}


def _read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def command(cls: type[T], group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command whose parameter ``options`` becomes the flags of `cls`, and ``--config``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
        flags = [_flag(cls, field) for field in dataclasses.fields(cls)]
        config = inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option(help="YAML or TOML file with any of these options")],
        )

        def run(**values: Any) -> None:
            arguments = {p.name: values.pop(p.name) for p in own}
            try:
                given = read_config(values.pop("config")) | {k: v for k, v in values.items() if v is not None}
                function(options=parse(cls, given), **arguments)
            except (ValueError, ImportError, OSError) as error:
                Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
                raise typer.Exit(2) from error
            except KeyboardInterrupt as stop:
                Console(stderr=True).print(f"[yellow]interrupted[/] {stop}", highlight=False, soft_wrap=True)
                raise typer.Exit(130) from stop

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [config, *flags]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        group.command(name=function.__name__.removesuffix("_command"))(run)
        return function

    return register


def _flag(cls: type[Options], field: dataclasses.Field[Any]) -> inspect.Parameter:
    """One field as a parameter that typer understands. Unset is None, so that a config file can be told from a flag."""
    kind = typing.get_type_hints(cls)[field.name]
    if isinstance(kind, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    rule = field.metadata
    notes = [rule["help"]]
    if rule["choices"]:
        notes.append(f"one of {', '.join(rule['choices'])}")
    default = "" if field.default is None else str(field.default)
    if rule["unit"] and default:
        default = f"{default} {rule['unit']}"
    elif rule["unit"]:
        notes.append(f"in {rule['unit']}")
    flag = typer.Option(help="; ".join(notes), show_default=default or False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
    )


# Commands


@command(HarvestOptions)
def harvest_command(
    options: HarvestOptions,
    output: Annotated[Path, typer.Argument(help="Folder of the store; an interrupted harvest there is resumed.")],
) -> None:
    """Store a model's activations, or import activations, as memory-mapped shards."""
    with Progress("harvest", options.max_tokens) as bar:
        if options.activations is not None:
            store = import_activations(
                output,
                options.activations,
                dtype=options.dtype,
                shard_tokens=options.shard_tokens,
                progress=bar.update,
            )
        else:
            settings = {k: v for k, v in options.to_dict().items() if k not in ("texts", "activations")}
            texts = None if options.texts is None else read_texts(options.texts)
            try:
                store = harvest(output, texts=texts, progress=bar.update, **settings)
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(f"finished shards are kept in {output}; the same command goes on") from stop
    out.print(f"{store.tokens:,} tokens of width {store.d} in {store.n_contexts:,} contexts → [bold]{output}[/]")


@command(TrainOptions)
def train_command(
    options: TrainOptions,
    activations: Annotated[Path, typer.Argument(help="A store written by `sparsekern harvest`.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    also: Annotated[
        list[Path] | None, typer.Option(help="Another store of the same tokens, for a crosscoder; may be repeated.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="A store of the same tokens to be written, for a transcoder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
) -> None:
    """Train a sparse autoencoder of any kind on stored activations, and report on it.

    One argument makes another architecture: --activation, --tied, --matryoshka, --experts; --also makes a crosscoder,
    --target a transcoder.
    """
    from sparsekern.analysis import runs

    stores = [ActivationStore(path) for path in [activations, *(also or [])]]
    targets = None if target is None else ActivationStore(target)
    sae = build_sae(options, [store.d for store in stores], None if targets is None else targets.d)
    store = stores[0] if len(stores) == 1 else JoinedStore(stores)
    experts = f" in {options.experts} experts" if options.experts > 1 else ""
    out.print(
        f"{type(sae).__name__} of {sae.d_sae:,} latents{experts}, {sae.activation.name} "
        f"({sae.activation.extra_repr()}), on {store.tokens:,} tokens of width {store.d} "
        f"({store.source.get('model', 'imported')}, {store.source.get('hook', '–')})"
    )
    loop = {name: getattr(options, name) for name in TrainConfig.names()}
    result = sk.train(sae, store, target=targets, output=output, resume=resume, overwrite=overwrite, **loop)
    written = runs.write_report(output, store, progress=True) if options.report else []
    _print_summary(result.summary, output, written)


def build_sae(options: TrainOptions, widths: list[int], d_out: int | None) -> sk.SAE:
    """The module that the options name, for sources of these widths and, for a transcoder, a target of that one."""
    kinds = {
        "matryoshka": options.matryoshka,
        "experts": options.experts > 1,
        "also": len(widths) > 1,
        "target": d_out is not None,
    }
    asked = [name for name, wanted in kinds.items() if wanted]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} make different architectures: choose one")
    if len(set(widths)) > 1:
        raise ValueError(f"the stores of a crosscoder must have one width, got {widths}")
    if options.skip and d_out is None:
        raise ValueError("skip goes with a target")
    d_in = widths[0]
    d_sae = options.latents or options.expansion * d_in
    activation = _activation(options)
    common: dict[str, Any] = {
        "aux_coefficient": options.aux_coefficient,
        "aux_k": options.aux_k,
        "dead_after": options.dead_after or min(10_000_000, options.steps * options.batch_size // 4),
        "generator": torch.Generator().manual_seed(options.seed),
        "device": _device(options.device),
    }
    if d_out is not None:
        if options.tied:
            raise ValueError("tied does not go with a target: encoder and decoder live in two spaces")
        return sk.Transcoder(d_in, d_sae, activation, d_out=d_out, skip=options.skip, **common)
    common["tied"] = options.tied
    if options.experts > 1:
        if not isinstance(activation, sk.TopK):
            raise ValueError("experts go with activation topk")
        common |= {"n_experts": options.experts, "n_active": options.active_experts, "balance": options.balance}
        return sk.SwitchSAE(d_in, d_sae, activation, **common)
    if len(widths) > 1:
        return sk.Crosscoder(len(widths), d_in, d_sae, activation, **common)
    if options.matryoshka:
        return sk.MatryoshkaSAE(d_in, d_sae, activation, **common)
    return sk.SAE(d_in, d_sae, activation, **common)


def _activation(options: TrainOptions) -> Activation:
    kind = ACTIVATIONS[options.activation]
    takes = inspect.signature(kind).parameters
    given: dict[str, Any] = {}
    for name in ("multi_k", "l1_coefficient", "p", "l0_coefficient", "bandwidth"):
        value = getattr(options, name)
        if value is not None and name not in takes:
            raise ValueError(f"{name} is no option of activation {options.activation}")
        if value is not None:
            given[name] = value
    if "k" in takes:
        given["k"] = options.k
    if "target_l0" in takes and options.l0_coefficient is None:
        given["target_l0"] = options.k
    if options.penalty_warmup:
        if "warmup_tokens" not in takes:
            raise ValueError(f"penalty_warmup is no option of activation {options.activation}")
        given["warmup_tokens"] = options.penalty_warmup * options.batch_size
    return kind(**given)


@command(EvalOptions)
def eval_command(
    options: EvalOptions,
    sae: Annotated[str, typer.Argument(help="Folder written by save_pretrained (runs/…/sae), or a Hub id.")],
    activations: Annotated[Path, typer.Argument(help="A store written by `sparsekern harvest`.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measures there as JSON.")] = None,
) -> None:
    """Measure a trained SAE: FVU, explained variance, cosine, L0, silent share, redundancy, density histogram.

    Redundancy is the largest cosine of a latent's decoder row and another's, the mean over latents that fire and the
    share above 0.9, each beside what random directions give. With --model also the cross-entropy and KL divergence of a
    language model with the SAE in it: recovered is 1 where nothing is lost, 0 where zeros, or the mean, serve as well.
    """
    module = sk.SAE.from_pretrained(sae, device=_device(options.device))
    store = ActivationStore(activations)
    if options.held_out == 1:
        x, contexts = store.rows(0, min(store.tokens, options.max_tokens)), torch.arange(store.n_contexts)
    else:
        held_out = store.split(options.held_out, options.seed)[1]
        x, contexts = held_out.load(options.max_tokens), held_out.contexts
    # A model that cannot be used says so before the work.
    run = None if options.model is None else _language_model(options, store, contexts)
    with Progress("eval", len(x)) as bar:

        def batches() -> typing.Iterator[torch.Tensor]:
            done = 0
            for batch in x.split(options.batch_size):
                yield batch
                done += len(batch)
                bar.update(done)

        evaluation = sk.evaluate(module, batches())
    measures = evaluation.to_dict()
    table = Table("measure", "value", title=f"{sae} on {evaluation.tokens:,} tokens", title_justify="left")
    for name in ("fvu", "explained_variance", "cosine", "l0", "silent_fraction"):
        table.add_row(name, f"{measures[name]:.4f}")
    for name in ("max_cosine", "duplicate_fraction"):
        table.add_row(name, f"{measures[name]:.4f}  (random directions {measures[f'{name}_null']:.4f})")
    for decade, count in measures["density_histogram"].items():
        table.add_row(f"density {decade}", f"{count:,} latents")
    out.print(table)
    if run is not None:
        model, hook, token_batches = run
        with Progress("in the model", None) as bar:
            recovered = loss_recovered(model, hook, module, token_batches, progress=bar.update).to_dict()
        measures |= {"model": options.model, "hook": hook, "loss_recovered": recovered}
        title = f"with {hook} replaced, over {recovered['tokens']:,} predictions, in nats"
        table = Table("measure", "value", title=title, title_justify="left")
        for name, value in recovered.items():
            if name != "tokens":
                table.add_row(name, f"{value:.4f}")
        out.print(table)
    if json_file is not None:
        write_json(json_file, {**measures, "sae": module.config(), "versions": versions()})


def _language_model(options: EvalOptions, store: ActivationStore, contexts: torch.Tensor) -> tuple[Any, str, list[Any]]:
    """The model, the name of the module that is replaced, and batches of texts."""
    assert options.model is not None
    if options.texts is None and store.source.get("model") != options.model:
        raise ValueError(f"{store.path} was not harvested from {options.model}: name texts to run it over with --texts")
    hook = options.hook or store.source.get("hook")
    if hook is None:
        raise ValueError(f"{store.path} does not say which module its activations are of: name it with --hook")
    tokenizer, model = load_model(options.model, causal=True)
    check_context_length(tokenizer, model, options.context_length)
    inner = f"{model.base_model_prefix}.{hook}"  # a harvest runs the model without its head, where names are shorter
    if inner in dict(model.named_modules()):
        hook = inner
    named_module(model, hook, "hook")
    if options.texts is not None:
        texts = read_texts(options.texts)
    else:
        wanted = contexts[: options.model_tokens].tolist()
        texts = [tokenizer.decode(store.token_ids[slice(*store.context_bounds[c : c + 2])].tolist()) for c in wanted]
    batches = token_batches(tokenizer, texts, options.context_length, _MODEL_BATCH, options.model_tokens)
    return model.to(_device(options.device)), hook, batches


@command(BenchOptions)
def bench_command(options: BenchOptions) -> None:
    """Time the kernels and full training steps against other implementations, by turns; write a record and a plot."""
    from sparsekern.bench import plot, run, table

    plot.check_installed()
    try:
        record = run.run(options, progress=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"finished cases, if any, are in {options.output}") from stop
    for grid in table.tables(record):
        shown = Table(*grid.header, title=grid.title, title_justify="left")
        for row in grid.rows:
            shown.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in row))
        out.print(shown)
    for line in table.missing(record):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    written = [options.output]
    picture = options.output.with_suffix(".png")
    if plot.plot_steps(record, picture):
        written.append(picture)
    out.print(f"→ {', '.join(f'[bold]{path}[/]' for path in written)}", soft_wrap=True)
    if any(case["failed"] for case in record["cases"]):
        raise typer.Exit(1)


def _study_of_activations(name: str, cls: type[Options], summary: str) -> None:
    """Register ``sparsekern study NAME``, which runs the study of that name on a store."""

    def run_study(
        options: Options,
        activations: Annotated[Path, typer.Argument(help="A store written by `sparsekern harvest`.")],
        output: Annotated[Path, typer.Option(help="Folder for page.md, its pictures, results.json and the SAEs.")],
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study in the folder.")] = False,
    ) -> None:
        _check_output(output, overwrite)
        module = importlib.import_module(f"sparsekern.analysis.studies.{name}")
        _study(module.study(ActivationStore(activations), options, output))

    run_study.__name__, run_study.__doc__ = name, summary
    command(cls, studies)(run_study)


_study_of_activations(
    "moe",
    MoeOptions,
    "What the experts of a mixture of experts divide among themselves: loads, labels, latents, a merge tree, a toy.",
)
_study_of_activations(
    "canonical",
    CanonicalOptions,
    "Whether SAEs from different seeds find the same latents, by width; and what starting from these saves.",
)
_study_of_activations(
    "splitting",
    SplittingOptions,
    "Which latents a wider SAE has for one of a narrower, and whether the same directions split them all.",
)
_study_of_activations(
    "completeness",
    CompletenessOptions,
    "What a wider SAE adds to a narrower one, which latents are sums of others, what is found, how much is there.",
)
_study_of_activations(
    "opposing",
    OpposingOptions,
    "Which latents oppose each other, whether they are the dense ones, and what signed latents make of them.",
)
_study_of_activations(
    "geometry",
    GeometryOptions,
    "How many dimensions codes fill; circles, numbers, implications, hierarchies; one space or many.",
)
_study_of_activations(
    "polytope",
    PolytopeOptions,
    "Which linear piece of a network a token is in, where the pieces meet, and what latents have to do with them.",
)
_study_of_activations(
    "plateaus",
    PlateausOptions,
    "How far an activation can be moved before the model's output notices, in which directions, and from where.",
)


@command(ToyOptions, studies)
def toy_command(
    options: ToyOptions,
    output: Annotated[Path, typer.Option(help="Folder for page.md, its pictures and results.json.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study in the folder.")] = False,
) -> None:
    """What SAEs do where the features are known: splitting, manifolds, absorption, hedging, a wrong L0, bigrams."""
    from sparsekern.analysis.studies import toy

    _check_output(output, overwrite)
    _study(toy.study(options, output))


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise where a study would be lost."""
    if (output / "page.md").exists() and not overwrite:
        raise ValueError(f"{output} holds a study already; overwrite it, or choose another folder")


def _study(written: list[Path]) -> None:
    out.print(f"Look at [bold]{written[0]}[/]; numbers: {written[-1]}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show what would run here for each op, and why the other backends would not; check the GPU's kernels."""
    from sparsekern.backends import cpu, cuda

    for name, version in versions().items():
        out.print(f"{name} {version}", highlight=False)
    whose = "torch's own threads" if cpu.borrows_threads else "threads started for each call"
    kernels = f"{cpu.isa()}, on {whose}" if cpu.isa() else "not built"
    out.print(f"{torch.get_num_threads()} threads, CPU kernels: {kernels}", highlight=False)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table = Table("device", "ops", "backend", "", "why")
    for device in devices:
        by_op: dict[str, list[tuple[str, bool, str]]] = {}
        for info in sk.backends(device):
            by_op.setdefault(info.op, []).append((info.backend, info.chosen, info.reason))
        alike: dict[tuple[tuple[str, bool, str], ...], list[str]] = {}
        for op, backends in by_op.items():
            alike.setdefault(tuple(backends), []).append(op)
        for found, ops in alike.items():
            for row, (backend, chosen, reason) in enumerate(found):
                head = ("", "") if row else (device, ", ".join(ops))
                table.add_row(*head, backend, "✓" if chosen else "", reason, end_section=row == len(found) - 1)
    out.print(table)
    out.print(f"CUDA C++ kernels: {cuda.summary()}", highlight=False)
    if len(devices) == 1:
        out.print("no CUDA device", highlight=False)
    elif not _check_gpus():
        raise typer.Exit(1)


def _check_gpus() -> bool:
    """Run and print every check of the kernels; whether all passed of those that are used."""
    from sparsekern.backends import check, cuda, forced, triton

    passed = True
    for device in (torch.device("cuda", index) for index in range(torch.cuda.device_count())):
        for name, engine in (("triton", triton), ("cuda", cuda)):
            used = name == "triton" or forced() == name
            reason = engine.missing(device)
            if reason is not None:
                out.print(f"{name} kernels on {device}: {reason}", highlight=False)
                passed = passed and not used
                continue
            with out.status(f"checking the {name} kernels on {device}"):
                results = check.run(engine, device)
            title = f"{name} kernels on {device}, {torch.cuda.get_device_name(device)}"
            table = Table("op", "dtype", "", "error", "at most", "seconds", "", title=title, title_justify="left")
            for result in results:
                numbers = (f"{number:.1e}" for number in (result.error, result.bound))
                mark = "✓" if result.passed else "[red]failed[/]"
                table.add_row(result.kernel, result.dtype, mark, *numbers, f"{result.seconds:.1f}", result.note)
                passed = passed and (result.passed or not used)
            out.print(table)
    return passed


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _print_summary(summary: dict[str, Any], output: Path, written: list[Path]) -> None:
    """What the run learned, and where to look."""
    fvu = summary["heldout_fvu"]
    table = Table("held out", "", title=f"What {output} learned", title_justify="left")
    table.add_row("variance explained", f"{1 - fvu:.1%}  (FVU {fvu:.4f})")
    if summary["pca_fvu"] is not None:
        components, pca = summary["pca_components"], summary["pca_fvu"]
        table.add_row(f"PCA with {components} components", f"{1 - pca:.1%}  (FVU {pca:.4f})")
    table.add_row("active latents a token", f"{summary['heldout_l0']:.1f} of {summary['sae']['d_sae']:,}")
    dead_after = f"{summary['sae']['dead_after']:,}"
    table.add_row("dead latents", f"{summary['dead_fraction']:.1%}  (silent for {dead_after} tokens of training)")
    rate = f"{summary['tokens_per_second']:,.0f} tokens/s"
    table.add_row("training", f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s, {rate}")
    out.print(table)
    if written:
        out.print(f"Look at {', '.join(f'[bold]{path}[/]' for path in written)}", soft_wrap=True)
    out.print(f'Load it: sparsekern.SAE.from_pretrained("{output / "sae"}")', highlight=False)
