"""Contenders by architecture, and the comparison of what they learn; the peers' own where they are installed."""

import importlib.util
import json
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.bench import memory, run, table, versus_peers
from sparsekern.bench.architectures import ENTRIES, OURS, contenders_of
from sparsekern.bench.contenders import Contender, Plan
from sparsekern.bench.options import ARCHITECTURES, BenchOptions, Case
from sparsekern.bench.peers import PEERS, largest, prefixes
from sparsekern.bench.versus_peers import Point, Settings
from sparsekern.data import ActivationStore, StoreWriter

TINY = Case("zipf", 64, 32, 512, 8)
NAMES = contenders_of(list(ARCHITECTURES))
VARYING = [name for name in NAMES if ENTRIES[name].kind.sparsity is not None]
SETTINGS = Settings(
    **{"latents": 64, "k": 4, "steps": 6, "batch_size": 32, "lr": 1e-3, "warmup_steps": 1, "decay_share": 0.2},
    **{"sparsity_warmup_steps": 2, "held_out": 0.3, "eval_tokens": 100},
)


def build(name, lr=1e-3, **options):
    if not versus_peers.installed(name):
        pytest.skip("the library is not installed")
    return ENTRIES[name].kind(TINY, lr, **options)


def error(contender, batch):
    with torch.no_grad():
        return (contender.reconstruct(batch[0], contender.modes[0])[0] - batch[-1]).square().sum().item()


def layers_for(contender, seed=0):
    return torch.randn(contender.layers, 64, 32, generator=torch.Generator().manual_seed(seed))


def stored(path, n=400, seed=0, lengths=(20, 30)):
    writer = StoreWriter(path, dtype="float32", d=16, source={"model": "made"}, vocab=None)
    lengths = list(lengths) * (n // sum(lengths))
    rows = torch.randn(sum(lengths), 16, generator=torch.Generator().manual_seed(seed))
    writer.add(rows, torch.full((len(rows),), -1, dtype=torch.int32), lengths)
    writer.flush()
    writer.finish()
    return ActivationStore(path)


def test_every_architecture_has_ours_and_a_peer():
    assert tuple(OURS) == tuple(PEERS) == ARCHITECTURES
    assert len(set(NAMES)) == len(NAMES) == len(OURS) + sum(map(len, PEERS.values()))
    assert all(ENTRIES[name].against in OURS and name.startswith(ENTRIES[name].against) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_learns_and_reconstructs(name):
    contender = build(name)
    batch = contender.inputs(layers_for(contender))
    contender.step(*batch)
    contender.settle(batch[0])
    before = error(contender, batch)
    for _ in range(12):
        assert contender.step(*batch).isfinite()
    assert error(contender, batch) < before
    rows, encoder = contender.rows(batch[0]), contender.encoder()
    assert (rows @ encoder.T).shape == (64, 512)
    for mode in contender.modes:
        with torch.no_grad():
            recon, active = contender.reconstruct(batch[0], mode)
        assert recon.shape == batch[-1].shape
        assert active.shape == (64,)
        assert 0 < active.float().mean() <= 512


@pytest.mark.parametrize("name", VARYING)
def test_settling_gives_k_active_latents(name):
    contender = build(name)
    x = layers_for(contender)[0]
    for _ in range(3):
        contender.step(x)
    contender.settle(x)
    with torch.no_grad():
        assert contender.reconstruct(x)[1].double().mean() == pytest.approx(TINY.k, rel=0.01)


@pytest.mark.parametrize("name", VARYING)
def test_the_penalty_can_be_weighed(name):
    """A heavier penalty, or a lower aim, leaves fewer active latents after the same steps."""
    found = []
    weights = (400.0, 4.0) if ENTRIES[name].kind.aims else (1e-6, 1e2)
    for weight in weights:
        torch.manual_seed(0)
        contender = build(name, lr=1e-2)
        for step in range(60):
            x = layers_for(contender, step)[0]
            contender.set_sparsity(weight)
            contender.step(x * contender.input_scale(x))
        with torch.no_grad():
            found.append(contender.reconstruct(x * contender.input_scale(x))[1].double().mean().item())
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OURS])
def test_peers_warm_up_and_decay_as_ours_does(name):
    plan = Plan(steps=10, warmup_steps=3, decay_share=0.4)
    contender = build(name, plan=plan)
    batch = contender.inputs(layers_for(contender))
    used = []
    step = contender.optimizer.step

    def watched(*arguments, **options):
        used.append(contender.optimizer.param_groups[0]["lr"])
        return step(*arguments, **options)

    contender.optimizer.step = watched
    for _ in range(10):
        contender.step(*batch)
    assert used == pytest.approx([1e-3 * plan.factor(number) for number in range(10)])
    assert used[0] < used[5] > used[9]


def test_prefixes_end_at_all_latents():
    assert prefixes(512) == (32, 64, 128, 256, 512)


def test_largest_is_what_k_entries_a_row_exceed():
    x = torch.randn(7, 50)
    assert (x > largest(x, 3)).sum() == 21


# The timing


def test_architectures_are_timed_beside_their_peers(monkeypatch):
    names = contenders_of(["batchtopk", "gated"])
    assert names[:3] == ["batchtopk", "batchtopk-saelens", "batchtopk-dictionary-learning"]
    monkeypatch.setattr(memory, "available", lambda: 10**13)
    teams = run.groups([*names, "sparsekern", "torch"], TINY, 0.6)
    assert teams == [names[:3], names[3:], ["sparsekern", "torch"]]
    monkeypatch.setattr(memory, "available", lambda: 0)
    assert run.groups(names[:3], TINY, 0.6) == [["batchtopk", name] for name in names[1:3]]
    taken = {"gated": [(2.0, 1.0)] * 2, "gated-saelens": [(8.0, 1.0)] * 2, "sparsekern": [(1.0, 1.0)] * 2}
    assert run.summary(taken, "gated-saelens")["over_sparsekern"]["median"] == 4
    assert "over_sparsekern" not in run.summary(taken, "gated")


def test_the_table_tells_active_latents_and_whose_step_is_ours():
    flat = {"low": 1.0, "median": 1.0, "high": 1.0}
    facts = {"parameters_and_optimizer_bytes": 2**20, "beyond_bytes": 0, "ratio": flat}
    steps = {
        "relu": {**facts, "l0": 32.0, "l0_at_end": 31.04},
        "relu-saelens": {**facts, "l0": 32.0, "l0_at_end": 32.0, "over_sparsekern": {**flat, "median": 0.5}},
    }
    record = {"cases": [{"data": "zipf", "shape": {"B": 8, "d": 4, "d_sae": 16, "k": 2}, "steps": steps, "failed": {}}]}
    assert table.active(record).rows == [["relu", "32.0 → 31.0"], ["relu-saelens", "32.0 → 32.0"]]
    assert table.against(record).rows == [["relu-saelens", "**0.50 (1.00–1.00)**"]]
    row = ["relu", "1.00 (1.00–1.00)", "saelens", "**0.50 (1.00–1.00)**", "1.00", "1.00"]
    assert table.architectures(record).rows == [row]
    steps["relu-dictionary-learning"] = {**facts, "over_sparsekern": {**flat, "median": 0.4}}
    assert table.architectures(record).rows[0][2] == "dictionary-learning"
    assert table.is_own("relu")
    assert not table.is_own("relu-saelens")


@pytest.mark.slow
def test_the_command_times_an_architecture(tmp_path):
    options = BenchOptions(architectures=["crosscoder"], parts=["steps"], quick=True, output=tmp_path / "r.json")
    (case,) = run.run(options)["cases"]
    assert not case["failed"]
    assert list(case["steps"]) == ["crosscoder", "crosscoder-torch"]
    assert case["steps"]["crosscoder-torch"]["over_sparsekern"]["median"] > 0


# The comparison of what they learn


def power_law(sparsity, aims):
    return 40 * sparsity**0.9 if aims else 60 / sparsity**1.4


@pytest.mark.parametrize("aims", [False, True])
@pytest.mark.parametrize("start", [1e-4, 0.3, 1.0, 50.0])
def test_the_search_encloses_the_target(start, aims):
    points = []
    while (sparsity := versus_peers.next_sparsity(points, start, 32, aims)) is not None:
        points.append(Point(sparsity, power_law(sparsity, aims), 1.0))
        assert len(points) <= versus_peers.MOST_RUNS
    below, above = versus_peers.neighbours(points, 32)
    assert below.l0 <= 32 < above.l0 <= versus_peers.CLOSE * below.l0


def test_fvu_is_interpolated_between_the_neighbours_only():
    points = [Point(1.0, l0, 3 * l0**-0.5) for l0 in (5.0, 28.0, 40.0, 90.0)]
    assert versus_peers.at_target(points, 32) == pytest.approx(3 / math.sqrt(32))
    assert versus_peers.at_target(points[:2], 32) is None
    assert versus_peers.at_target([points[0], points[3]], 32) is None, "they are too far apart"


def test_one_measure_for_all():
    contender = build("topk")
    batches = torch.randn(3, 64, 32)
    found = versus_peers.measure(contender, (batch[None] for batch in batches), 2.0, "eval")
    expected = sk.evaluate(contender.sae, 2 * batches)
    assert found["fvu"] == pytest.approx(expected.fvu, rel=1e-9)
    assert found["l0"] == pytest.approx(expected.l0)


class Zeros(Contender):
    """Reconstructs nothing, and takes what it is given."""

    layers, sparsity = 2, 1.0
    seen: ClassVar = []

    def build(self):
        self.module = nn.Linear(1, 1)

    def inputs(self, layers):
        return layers[0], layers[1]

    def input_scale(self, x):
        return 0.5

    def set_sparsity(self, sparsity):
        self.weight = sparsity

    def step(self, x, target):
        self.seen.append((x, target, self.weight))
        return torch.zeros(())

    def reconstruct(self, x, mode="eval"):
        return torch.zeros_like(x), torch.full((len(x),), 4 / self.weight)


def test_runs_are_recorded_and_not_done_again(tmp_path, monkeypatch):
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second", seed=1)
    monkeypatch.setitem(ENTRIES, "transcoder", ENTRIES["transcoder"].__class__(Zeros))
    monkeypatch.setattr(Zeros, "seen", [])
    report = {"settings": vars(SETTINGS), "runs": [], "pca_fvu": {}}
    arguments = (["transcoder"], [first], [first, second], SETTINGS, [3], 10, tmp_path / "report.json")
    versus_peers.compare(report, *arguments)
    runs = report["runs"]
    assert json.loads((tmp_path / "report.json").read_text())["runs"] == runs
    assert [run["l0"] for run in runs] == pytest.approx([4.0, 4.6], rel=0.05)
    assert all(run["input_scale"] == 0.5 and run["fvu"] > 0.9 for run in runs)
    x, target, _ = Zeros.seen[0]
    loader = versus_peers.Data([first, second], SETTINGS, 3)
    torch.testing.assert_close(torch.stack([x, target]), 0.5 * loader.batch(0, 2))
    ramp = [weight for *_, weight in Zeros.seen[: SETTINGS.steps]]
    assert ramp == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    steps = len(Zeros.seen)
    versus_peers.compare(report, *arguments)
    assert len(Zeros.seen) == steps


def test_a_run_that_takes_too_long_is_stopped_and_not_tried_again(tmp_path, monkeypatch):
    store = stored(tmp_path / "store")
    report = {"settings": vars(SETTINGS), "runs": [], "pca_fvu": {}}
    arguments = (["topk"], [store], [], SETTINGS, [0], 0, None)
    versus_peers.compare(report, *arguments)
    (run,) = report["runs"]
    assert run["stopped"].startswith("after 1 steps")
    versus_peers.compare(report, *arguments)
    assert len(report["runs"]) == 1
    assert "| topk |" not in versus_peers.table(report)


def test_layers_of_other_texts_are_refused(tmp_path):
    stores = [stored(tmp_path / "one"), stored(tmp_path / "two", lengths=(30, 20))]
    with pytest.raises(ValueError, match="same contexts"):
        versus_peers.Data(stores, SETTINGS, 0)


def test_the_report_shows_each_peer_and_where_ours_is_behind():
    runs = [
        {"contender": "topk", "seed": 0, "sparsity": None, "fvu": 0.11, "l0": 32.0},
        {"contender": "topk-sparsify", "seed": 0, "sparsity": None, "fvu": 0.10, "l0": 32.0},
        {"contender": "topk-saelens", "seed": 0, "sparsity": None, "fvu": 0.22, "l0": 32.0},
        {"contender": "gated-saelens", "seed": 0, "sparsity": 1.0, "fvu": 0.2, "l0": 40.0},
    ]
    text = versus_peers.table({"settings": {"k": 32}, "runs": runs})
    assert "| topk | sparsify | 0.1100 | 0.1000 | **1.100** |" in text
    assert "| topk | saelens | 0.1100 | 0.2200 | 0.500 |" in text
    assert "| gated | saelens | – | – | – |" in text


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae_lens is not installed")
def test_the_threshold_of_saelens_is_measured_in_its_exported_form():
    contender = build("batchtopk-saelens")
    x = layers_for(contender)[0]
    contender.step(x)
    pre = (x - contender.sae.b_dec) @ contender.sae.W_enc + contender.sae.b_enc
    norms = contender.sae.W_dec.norm(dim=1)
    expected = (pre * norms > contender.sae.topk_threshold).sum(1)
    assert torch.equal(contender.reconstruct(x, "threshold")[1], expected)
