"""The command line, end to end on a small store."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.analysis.studies.options import MoeOptions
from sparsekern.backends import OPS
from sparsekern.bench.options import BenchOptions
from sparsekern.cli import EvalOptions, HarvestOptions, TrainOptions, app, parse
from sparsekern.data import EMBEDDED_MODEL, ActivationStore, StoreWriter
from sparsekern.training import TrainConfig

TRAIN = [
    "--latents",
    "64",
    "--k",
    "4",
    "--steps",
    "30",
    "--batch-size",
    "64",
    "--lr",
    "3e-3",
    "--checkpoint-every",
    "10",
]


def plain(result):
    """Output without colours and with single spaces: rich wraps lines to the width of the terminal."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def store(tmp_path):
    """Contexts of 20 tokens; token t is direction t plus noise, so latents can find the tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab = [f"word{i}" for i in range(50)]
    directions = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator), dim=1)
    ids = torch.randint(0, 50, (4000,), generator=generator)
    x = directions[ids] + 0.05 * torch.randn(4000, 16, generator=generator)
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"model": "made", "hook": "up"}, vocab=vocab)
    writer.add(x, ids.int(), [20] * 200)
    writer.flush()
    writer.finish()
    return tmp_path / "acts"


def test_train_then_eval(cli, store, tmp_path):
    result = cli("train", store, "--output", "run", *TRAIN)
    assert result.exit_code == 0, result.output
    produced = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"sae", "metrics.jsonl", "summary.json", "loss.png", "density.png", "features.md"} <= produced
    assert "What run learned" in plain(result)
    assert "Look at run/features.md, run/loss.png, run/density.png" in plain(result)
    page = (tmp_path / "run" / "features.md").read_text()
    assert page.count("## Latent") == 40
    assert "**⟦word" in page
    for name in ("loss.png", "density.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")

    measured = cli("eval", "run/sae", store, "--json", "eval.json")
    assert measured.exit_code == 0, measured.output
    again = json.loads((tmp_path / "eval.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["fvu"] == pytest.approx(summary["heldout_fvu"], rel=1e-6), (
        "eval must use the split of the training run"
    )
    whole = cli("eval", "run/sae", store, "--held-out", 1)
    assert "on 4,000 tokens" in plain(whole)
    assert f"{again['max_cosine']:.4f} (random directions {again['max_cosine_null']:.4f})" in plain(measured)
    assert 0 <= again["duplicate_fraction"] <= 1
    assert 0 < again["max_cosine"] < 1


@pytest.fixture
def causal_model(tmp_path):
    """Folder of a random GPT-2 with d = 16, two layers and a vocabulary of words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny-gpt2"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=10, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_eval_in_the_model(cli, causal_model, store, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text("the cat sat on a mat and the dog ran " * (1 + number % 3))
    options = ["--context-length", "32", "--json", "eval.json"]
    harvested = cli("harvest", "own", "--model", causal_model, "--texts", "texts", "--hook", "h.1", *options[:2])
    assert harvested.exit_code == 0, harvested.output
    sae = sk.SAE(16, 32, sk.TopK(16), pre_bias=False)
    with torch.no_grad():  # a perfect one
        sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
        sae.W_dec.copy_(sae.W_enc)
    sae.save_pretrained(tmp_path / "sae")

    measured = cli("eval", "sae", "own", "--model", causal_model, *options)
    assert measured.exit_code == 0, measured.output
    assert "with transformer.h.1 replaced" in plain(measured)
    assert "recovered_from_zero │ 1.0000" in plain(measured)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["hook"] == "transformer.h.1"
    assert found["loss_recovered"]["recovered_from_zero"] == pytest.approx(1, abs=1e-3)
    assert found["loss_recovered"]["kl"] == pytest.approx(0, abs=1e-5)
    assert found["loss_recovered"]["tokens"] in range(9, 2 * 29 + 1)  # two held-out contexts

    texts = ["--texts", "texts", "--hook", "transformer.h.0", "--model-tokens", "100"]
    measured = cli("eval", "sae", store, "--model", causal_model, *texts, *options)
    assert measured.exit_code == 0, measured.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert 90 <= found["loss_recovered"]["tokens"] < 130
    for arguments, message in [
        (["--model", causal_model], "was not harvested from"),
        (["--model", causal_model, *texts, "--hook", "h.7"], "hook 'h.7' is not a module of GPT2LMHeadModel"),
        (["--model", causal_model, *texts, "--context-length", 33], "context_length must be in 1 … 32"),
        (["--model", EMBEDDED_MODEL, *texts], "gives no logits: it has no weights for the head of a language model"),
    ]:
        refused = cli("eval", "sae", store, "--context-length", 32, *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in plain(refused)


def test_a_config_file_sets_options_and_a_flag_wins(cli, store, tmp_path):
    (tmp_path / "run.yaml").write_text("latents: 48\nk: 3\nsteps: 6\nbatch-size: 64\nlr: 1e-3\nreport: false\n")
    (tmp_path / "run.toml").write_text("latents = 48\nk = 3\nsteps = 6\nbatch_size = 64\nlr = 1e-3\nreport = false\n")
    for file in ("run.yaml", "run.toml"):
        result = cli("train", store, "--output", f"out-{file}", "--config", file, "--k", 5)
        assert result.exit_code == 0, result.output
        summary = json.loads((tmp_path / f"out-{file}" / "summary.json").read_text())
        assert summary["sae"]["d_sae"] == 48
        assert summary["sae"]["activation"]["k"] == 5
        assert summary["train"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("latnets: 48\n", "unknown option 'latnets'; did you mean 'latents'?"),
        ("latents: many\n", "latents: Input should be a valid integer"),
        ("k: 0\n", "k must be at least 1, got 0"),
        ("optimizer: sgd\n", "optimizer must be one of adam, got 'sgd'"),
        ("- 3\n", "must hold `name: value` pairs"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_bad_config_files(cli, store, tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    result = cli("train", store, "--output", "run", "--config", "run.yaml")
    assert result.exit_code == 2
    assert message in plain(result)
    assert not (tmp_path / "run").exists()


def test_config_files_of_other_kinds_are_refused(cli, store, tmp_path):
    (tmp_path / "run.toml").write_text("k = = 3")
    (tmp_path / "run.json").write_text("{}")
    assert "not valid TOML" in plain(cli("train", store, "--output", "run", "--config", "run.toml"))
    assert "must end in .toml, .yaml, .yml" in plain(cli("train", store, "--output", "run", "--config", "run.json"))


def test_errors_are_messages_not_tracebacks(cli, store, tmp_path):
    (tmp_path / "broken").mkdir()
    for arguments, message in [
        (["train", store, "--output", "run", "--latents", 64, "--k", 65], "k must be at most d_sae=64, got 65"),
        (["train", "nowhere", "--output", "run"], "nowhere"),
        (["train", store, "--output", "run", "--resume"], "holds no checkpoint to resume from"),
        (["train", store, "--output", "run", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["eval", "nowhere", store], "neither a folder nor a Hub id"),
        (["eval", "broken", store], "holds no config.json"),
        (["harvest", "new", "--model", "no-such-model", "--texts", tmp_path / "broken"], "broken"),
    ]:
        result = cli(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in plain(result)
        assert "Traceback" not in result.output


def test_a_run_is_kept_resumed_and_overwritten(cli, store):
    arguments = ["train", store, "--output", "run", "--no-report", *TRAIN]
    assert cli(*arguments).exit_code == 0
    assert "holds a run already" in plain(cli(*arguments))
    assert cli(*arguments, "--resume").exit_code == 0
    refused = cli(*arguments, "--resume", "--lr", "0.5")
    assert "another configuration (train.lr: 0.003 there, 0.5 now)" in plain(refused)
    assert cli(*arguments, "--overwrite").exit_code == 0


def test_a_mixture_of_experts_trains_resumes_and_is_evaluated(cli, store, tmp_path):
    mixture = ["--experts", "4", "--active-experts", "2", "--balance", "bias"]
    trained = cli("train", store, "--output", "run", *TRAIN, *mixture)
    assert trained.exit_code == 0, trained.output
    assert "in 4 experts" in plain(trained)
    assert cli("train", store, "--output", "run", "--no-report", *TRAIN, *mixture, "--resume").exit_code == 0
    sae = sk.SAE.from_pretrained(tmp_path / "run" / "sae")
    assert (sae.n_experts, sae.n_active, sae.balance) == (4, 2, "bias")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["expert_load_min"] <= 1 <= row["expert_load_max"] for row in rows)
    assert cli("eval", "run/sae", store).exit_code == 0
    assert "n_experts must divide" in plain(cli("train", store, "--output", "other", *TRAIN, "--experts", "7"))


def test_a_corrupted_shard_is_found_before_training(cli, store, tmp_path):
    (shard,) = store.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    result = cli("train", store, "--output", "run", *TRAIN)
    assert result.exit_code == 2
    assert shard.name in plain(result)
    assert not (tmp_path / "run").exists()


def test_harvest_imports_activations(cli, tmp_path):
    (tmp_path / "in").mkdir()
    x = np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32)
    np.save(tmp_path / "in" / "a.npy", x)
    result = cli("harvest", "acts", "--activations", "in", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "700 tokens of width 6" in plain(result)
    rows = ActivationStore(tmp_path / "acts").rows(0, 700)
    np.testing.assert_allclose(rows.numpy(), x, atol=2e-3)
    x[5, 2] = np.nan
    np.save(tmp_path / "in" / "a.npy", x)
    result = cli("harvest", "bad", "--activations", "in")
    assert result.exit_code == 2
    assert "5" in plain(result)


def test_imported_activations_train_without_a_page_of_contexts(cli, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32))
    assert cli("harvest", "acts", "--activations", "a.npy").exit_code == 0
    result = cli("train", "acts", "--output", "run", *TRAIN)
    assert result.exit_code == 0, result.output
    assert "Look at run/loss.png, run/density.png" in plain(result)
    assert not (tmp_path / "run" / "features.md").exists()


def test_harvest_runs_the_embedded_model_over_text_files(cli, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("The file could not be opened because it does not exist. " * 5)
    result = cli("harvest", "acts", "--texts", "texts")
    assert result.exit_code == 0, result.output
    store = ActivationStore(tmp_path / "acts")
    assert store.d == 384
    assert "could not be opened" in store.context_text(0)
    (tmp_path / "texts" / "empty.txt").write_text("")
    result = cli("harvest", "other", "--texts", "texts")
    assert result.exit_code == 2
    assert "empty.txt" in plain(result)
    assert not (tmp_path / "other").exists()


def test_ctrl_c_then_resume(store, tmp_path, interruptible):
    """A real process and a real signal; the continued run ends on the same bits as one that was left alone."""
    command = [sys.executable, "-m", "sparsekern", "train", str(store), "--no-report", *TRAIN]
    command += ["--steps", "400", "--log-every", "1", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    run = interruptible([*command, str(tmp_path / "parts")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "parts" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, "the run never began"
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    subprocess.run([*command, str(tmp_path / "parts"), "--resume"], check=True, capture_output=True)
    one, two = (sk.SAE.from_pretrained(tmp_path / name / "sae").state_dict() for name in ("whole", "parts"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.slow
def test_ctrl_c_in_a_harvest_then_the_same_command_again(tmp_path, interruptible):
    (tmp_path / "texts").mkdir()
    for number in range(300):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} is about opening files. " * (1 + number % 9))
    command = [sys.executable, "-m", "sparsekern", "harvest", "--texts", str(tmp_path / "texts")]
    command += ["--shard-tokens", "500", "--batch-tokens", "200"]
    run = interruptible([*command, str(tmp_path / "parts")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("shard-*.safetensors")):
        assert time.monotonic() < deadline, "the harvest never began"
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "the same command goes on" in errors
    with pytest.raises(ValueError, match="same harvest again"):
        ActivationStore(tmp_path / "parts")
    subprocess.run([*command, str(tmp_path / "parts")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    parts, whole = (ActivationStore(tmp_path / name).manifest["shards"] for name in ("parts", "whole"))
    assert [shard["sha256"] for shard in parts] == [shard["sha256"] for shard in whole]


@pytest.mark.parametrize("command", ["harvest", "train", "eval", "bench"])
def test_help_shows_every_option_with_type_and_default(cli, command):
    shown = plain(cli(command, "--help"))
    options = {"harvest": HarvestOptions, "train": TrainOptions, "eval": EvalOptions, "bench": BenchOptions}[command]
    for name in options.names():
        assert f"--{name.replace('_', '-')}" in shown
    if command == "train":
        assert "[default: (2048 tokens)]" in shown
        assert "<float> peak learning rate" in shown


def test_study_moe_writes_its_page_and_keeps_it(cli, store, tmp_path):
    command = ["study", "moe", store, "--output", "study", "--quick", "--no-controls", "--no-toy", "--device", "cpu"]
    result = cli(*command)
    assert result.exit_code == 0, result.output
    assert "Look at study/page.md; numbers: study/results.json" in plain(result)
    page = (tmp_path / "study" / "page.md").read_text()
    assert "## What each expert responds to" in page
    again = cli(*command)
    assert again.exit_code == 2
    assert "study holds a study already; overwrite it, or choose another folder" in plain(again)
    (tmp_path / "moe.yaml").write_text("experts: 5\nlatents: 64\n")
    refused = cli("study", "moe", store, "--output", "other", "--config", "moe.yaml")
    assert refused.exit_code == 2
    assert "n_experts must divide d_sae=64, got 5" in plain(refused)


def test_studies_are_listed_with_all_their_options(cli):
    assert "moe" in plain(cli("study", "--help"))
    shown = plain(cli("study", "moe", "--help"))
    for name in MoeOptions.names():
        assert f"--{name.replace('_', '-')}" in shown


def test_doctor_names_a_backend_for_every_op(cli):
    shown = plain(cli("doctor"))
    for op in OPS:
        assert op in shown
    assert "chosen" in shown
    assert shown.count("sparse_decode") == 1 + torch.cuda.is_available()  # once a device


def test_options_are_coerced_and_checked_in_one_place():
    assert parse(TrainOptions, {"lr": "1e-3", "steps": "7"}).lr == 1e-3
    with pytest.raises(ValueError, match="held_out must be below 1"):
        parse(TrainOptions, {"held_out": 1.0})
    assert set(TrainConfig.names()) <= set(TrainOptions.names())


@pytest.mark.parametrize(
    ("flags", "kind", "activation"),
    [
        (["--activation", "batchtopk"], sk.SAE, sk.BatchTopK),
        (["--activation", "jumprelu", "--penalty-warmup", "5"], sk.SAE, sk.JumpReLU),
        (["--activation", "relu", "--p", "0.5", "--l1-coefficient", "0.1", "--tied"], sk.SAE, sk.ReLU),
        (["--matryoshka", "--activation", "gated"], sk.MatryoshkaSAE, sk.Gated),
        (["--multi-k", "16"], sk.SAE, sk.TopK),
        (["--target", "acts", "--skip"], sk.Transcoder, sk.TopK),
        (["--also", "acts", "--also", "acts"], sk.Crosscoder, sk.TopK),
    ],
)
def test_one_argument_makes_another_architecture(cli, store, tmp_path, flags, kind, activation):
    result = cli("train", store, "--output", "run", *TRAIN, "--no-report", *flags)
    assert result.exit_code == 0, plain(result)
    sae = sk.SAE.from_pretrained(tmp_path / "run" / "sae")
    assert (type(sae), type(sae.activation)) == (kind, activation)
    assert kind.__name__ in plain(result)
    if activation is sk.JumpReLU:
        assert (sae.activation.target_l0, sae.activation.warmup_tokens) == (4, 5 * 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--matryoshka", "--experts", "2"], "matryoshka and experts make different architectures"),
        (["--experts", "2", "--activation", "relu"], "experts go with activation topk"),
        (["--p", "0.5"], "p is no option of activation topk"),
        (["--penalty-warmup", "5"], "penalty_warmup is no option of activation topk"),
        (["--skip"], "skip goes with a target"),
        (["--target", "acts", "--tied"], "tied does not go with a target"),
    ],
)
def test_architectures_that_do_not_go_together_are_refused(cli, store, flags, message):
    result = cli("train", store, "--output", "run", *TRAIN, *flags)
    assert result.exit_code == 2
    assert message in plain(result)
