"""``sparsekern bench``: the whole command on a tiny shape, and its parts without processes."""

import json
import re
from contextlib import ExitStack

import pytest
import torch
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.bench import kernels, memory, run, table
from sparsekern.bench.contenders import ENTRIES
from sparsekern.bench.options import CONTENDERS, BenchOptions, Case
from sparsekern.cli import app
from sparsekern.data import StoreWriter

TINY = Case("zipf", 64, 32, 512, 8)


def plain(result):
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"model": "made", "hook": "up"}, vocab=None)
    writer.add(torch.randn(700, 16), torch.full((700,), -1, dtype=torch.int32), [20] * 35)
    writer.flush()
    writer.finish()
    return tmp_path / "acts"


@pytest.mark.slow
def test_the_command_writes_a_record_and_a_plot(cli, store, tmp_path):
    result = cli(
        *("--quick", "--activations", store, "--shapes", "64,16,256,4", "--output", "results/tiny.json"),
        *("--contenders", "sparsekern", "--contenders", "torch", "--data", "activations"),
    )
    assert result.exit_code == 0, result.output
    shown = plain(result)
    assert "full step ÷ one fp32 encoder matmul" in shown
    assert "→ results/tiny.json, results/tiny.png" in shown
    assert (tmp_path / "results" / "tiny.png").read_bytes().startswith(b"\x89PNG")

    record = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert {"date", "commit", "device", "threads", "versions"} <= set(record)
    assert record["store"]["model"] == "made"
    (case,) = record["cases"]
    assert case["shape"] == {"B": 64, "d": 16, "d_sae": 256, "k": 4}
    assert not case["failed"]
    assert list(case["steps"]) == ["sparsekern", "torch"]
    parameters = 2 * 256 * 16 + 256 + 16
    for measured in case["steps"].values():
        for spread in (measured["step_ms"], measured["matmul_ms"], measured["ratio"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert measured["parameters_and_optimizer_bytes"] == pytest.approx(3 * 4 * parameters, rel=0.01)
        assert measured["loss"] > 0
        assert measured["timed"]
    assert "over_sparsekern" in case["steps"]["torch"]
    assert case["kernels"]["ratio"]["matmul"]["median"] == 1
    assert case["kernels"]["exactness"]["wrong"] == 0
    assert case["kernels"]["exactness"]["recall_float64"] > 0.99
    lines = table.markdown(record).splitlines()
    assert any(line.startswith("| sparsekern |") for line in lines)
    assert any(line.startswith("| topk_encode |") for line in lines)


def test_a_failing_worker_is_reported_and_the_others_go_on(cli, monkeypatch, tmp_path):
    broken = ENTRIES["torch"].__class__(ENTRIES["torch"].kind, environment={"SPARSEKERN_CPU_ISA": "none"})
    monkeypatch.setitem(run.ENTRIES, "torch", broken)
    result = cli(
        "--quick", "--parts", "steps", "--contenders", "torch", "--contenders", "sparsekern", "--output", "r.json"
    )
    assert result.exit_code == 1, result.output
    assert "torch: failed at zipf 64, 32, 512, 8" in plain(result)
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert "SPARSEKERN_CPU_ISA" in case["failed"]["torch"]
    assert "sparsekern" in case["steps"]


def test_an_error_inside_a_worker_comes_back_with_its_traceback():
    with ExitStack() as stack:
        worker = run.Worker("sparsekern", threads=1)
        stack.callback(worker.stop)
        with pytest.raises(run.WorkerError, match="open comes first"):
            worker.ask("time", call="step", batch=0)
        with pytest.raises(run.WorkerError, match="No such file"):
            worker.ask("open", what="torch", case=vars(TINY), batches="nowhere", lr=1e-3, warm_up=2, seed=0)


def test_peers_that_are_not_installed_are_left_out_unless_named(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "sparsify" else object())
    names, skipped = run.available(None, threads=1)
    assert "sparsify" not in names
    assert {"torch", "saelens", "dictionary-learning"} <= set(names)
    assert skipped["sparsify"] == "sparsify is not installed"
    assert skipped["sparsekern-1-thread"] == "all have one thread"
    with pytest.raises(ValueError, match=r"sparsify is not installed.*sparsekern\[bench\]"):
        run.available(["sparsekern", "sparsify"], threads=2)


class FakeWorker:
    """Answers at once; every request of all of them goes into one log."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def ask(self, do, call=None, **_):
        self.log.append((self.name, call))
        return {"ms": {"sparsekern": 2.0, "torch": 6.0}[self.name] if call == "step" else 4.0} if call else {"loss": 1}


def test_contenders_take_turns_one_step_at_a_time(monkeypatch):
    log, failed = [], {}
    monkeypatch.setattr(run, "PAUSE", 0)
    monkeypatch.setattr(run.Bench, "open", lambda self, what, stack: (FakeWorker(what, log), {"facts": {}}))
    meter = run.Meter(run.Progress("bench", None, shown=False))
    bench = run.Bench(TINY, BenchOptions(rounds=4), "batches", 1, meter, failed)
    result = bench.steps([["sparsekern", "torch"]])
    turns = [log[i : i + 2] for i in range(0, 16, 2)]
    assert all(first[0] == second[0] for first, second in turns), "a matmul stands beside each step"
    assert {tuple(call for _, call in turn) for turn in turns} == {("step", "matmul"), ("matmul", "step")}
    assert [turn[0][0] for turn in turns] == ["sparsekern", "torch", "torch", "sparsekern"] * 2
    assert meter.done == 8
    assert result["sparsekern"]["ratio"]["median"] == 0.5
    assert result["torch"]["over_sparsekern"] == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_teams_fit_into_memory_and_sparsekern_is_in_each(monkeypatch):
    names = list(CONTENDERS)
    large = Case("zipf", 512, 2048, 65536, 64)
    monkeypatch.setattr(memory, "available", lambda: 24 * 2**30)
    teams = run.groups(names, large, 0.6)
    assert len(teams) == len(names) - 1
    assert all(team[0] == "sparsekern" and len(team) == 2 for team in teams)
    monkeypatch.setattr(memory, "available", lambda: 10**13)
    assert run.groups(names, large, 0.6) == [names]
    assert run.groups(["sparsekern"], large, 0.6) == [["sparsekern"]]
    assert run.groups(["torch", "sparsify"], TINY, 0.6) == [["torch", "sparsify"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2,3"], "shapes must be four whole numbers B,d,N,k, got '1,2,3'"),
        (["--shapes", "8,4,16,17"], "k in 1 … N, got '8,4,16,17'"),
        (["--contenders", "tensorflow"], "contenders must be one of sparsekern"),
        (["--parts", "steps", "--parts", "gpu"], "parts must be one of kernels, steps, got 'gpu'"),
        (["--data", "activations"], "data=activations needs a store"),
        (["--rounds", "1"], "rounds must be at least 2"),
        (["--output", "record.txt"], "output must end in .json"),
    ],
)
def test_bad_options_are_messages(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert message in plain(result)


def test_cases_follow_the_store(cli, store):
    assert [case.d for case in BenchOptions().cases(None)] == [768, 384, 2048]
    assert BenchOptions().cases(384)[-1] == Case("activations", 2048, 384, 24576, 32)
    only = BenchOptions(shapes=["64,16,256,4"], activations=store, data="activations").cases(16)
    assert only == [Case("activations", 64, 16, 256, 4)]
    refused = cli("--shapes", "64,32,256,4", "--activations", store)
    assert "shapes must hold one of d=16" in plain(refused)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "torch-compile"])
def test_every_contender_learns(name):
    kind = ENTRIES[name].kind
    for module in kind.imports:
        pytest.importorskip(module)
    contender = kind(TINY, 1e-3)
    x = torch.randn(64, 32)
    losses = [contender.step(x).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert contender.encoder().shape == (512, 32)
    assert contender.state_bytes() == pytest.approx(3 * 4 * (2 * 512 * 32 + 512 + 32), rel=0.05)  # and a router


def test_plain_torch_takes_the_same_step():
    """From the same weights, the step of the baseline ends where sparsekern's does."""
    ours, theirs = (ENTRIES[name].kind(TINY, 1e-3) for name in ("sparsekern", "torch"))
    ours.trainer.config = ours.trainer.config.of({**ours.trainer.config.to_dict(), "fit_start": False})
    for name, parameter in ours.sae.named_parameters():
        getattr(theirs, name).data.copy_(parameter.data)
    for _ in range(3):
        x = torch.randn(64, 32)
        assert ours.step(x).item() == pytest.approx(theirs.step(x).item(), rel=1e-4)
    torch.testing.assert_close(ours.sae.W_dec, theirs.W_dec, atol=1e-4, rtol=1e-3)


def test_wrong_indices_are_counted(monkeypatch):
    sae, x = sk.SAE(32, 512, sk.TopK(8)), torch.randn(40, 32)
    assert kernels.exactness(sae, 8, x)["wrong"] == 0
    true = sk.topk_encode

    def slightly_wrong(*arguments):
        codes = true(*arguments)
        least = (arguments[0] @ arguments[1].T).argmin(1)
        codes.indices[5, 3] = least[5]
        return codes

    monkeypatch.setattr(sk, "topk_encode", slightly_wrong)
    found = kernels.exactness(sae, 8, x)
    assert (found["rows"], found["wrong"]) == (40, 1)
    assert found["recall_float64"] == 1 - 1 / 320
    assert found["largest_gap"] == pytest.approx(1.0)


def test_growth_sees_what_a_call_allocates():
    grown = memory.growth(lambda: torch.ones(2**24))
    if grown is None:
        pytest.skip("this system does not tell")
    assert 0.9 * 2**26 < grown < 1.5 * 2**26


def test_the_table_shows_where_a_peer_wins_and_what_is_missing():
    flat = {"low": 1.0, "median": 1.0, "high": 1.0}
    facts = {"parameters_and_optimizer_bytes": 2**20, "beyond_bytes": 2**20, "ratio": {**flat, "median": 1.25}}
    record = {
        **{"device": "cpu", "threads": 2, "cpu_kernels": "avx2", "date": "2026-11-22", "commit": "0123456789"},
        "options": {"rounds": 9},
        "skipped": {"sparsify": "sparsify is not installed"},
        "cases": [
            {
                "data": "zipf",
                "shape": {"B": 8, "d": 4, "d_sae": 16, "k": 2},
                "steps": {
                    "sparsekern": facts,
                    "torch": {**facts, "over_sparsekern": {**flat, "median": 0.9}},
                    "saelens": {**facts, "over_sparsekern": {**flat, "median": 1.1}},
                    "sparsekern-avx2": {**facts, "over_sparsekern": {**flat, "median": 0.9}},
                },
                "failed": {"torch-compile": "Traceback …\nRuntimeError: no compiler"},
            }
        ],
    }
    text = table.markdown(record)
    assert "| torch | **1.25 (1.00–1.00)** |" in text
    assert "| sparsekern-avx2 | 1.25 (1.00–1.00) |" in text, "its own kernels are no peer"
    assert "| full step ÷ one fp32 matmul | 1.25 |" in text
    assert "| SAELens' step ÷ sparsekern's | 1.10 |" in text
    assert "sparsify's step" not in text
    assert "| saelens | 1.25 (1.00–1.00) |" in text
    assert "| torch | **0.90 (1.00–1.00)** |" in text
    assert "| saelens | 2.00 (+1 MiB) |" in text
    assert "- sparsify: left out, sparsify is not installed" in text
    assert "- torch-compile: failed at zipf 8, 4, 16, 2: RuntimeError: no compiler" in text
