"""train(): its files, resuming, interruption, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import sparsekern as sk
from sparsekern.training import CheckpointError, read_metrics

OPTIONS = {"steps": 24, "batch_size": 32, "lr": 3e-3, "log_every": 4, "eval_every": 8, "checkpoint_every": 8}


def make(d_sae=32):
    return sk.SAE(8, d_sae, sk.TopK(3), dead_after=200, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data():
    return torch.randn(600, 8)


def run(data, output, **options):
    return sk.train(make(), data, output=output, progress=False, **{**OPTIONS, **options})


def weights_of(folder):
    return sk.SAE.from_pretrained(folder / "sae").state_dict()


def test_a_run_leaves_what_it_promises(data, tmp_path):
    result = run(data, tmp_path / "run")
    folder = result.output
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert {"step", "tokens", "loss", "fvu", "l0", "dead_fraction", "tokens_per_second"} <= rows[0].keys()
    assert ["heldout_fvu" in row for row in rows] == [False, True, False, True, False, True]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_fvu"] == rows[-1]["heldout_fvu"] == result.evaluation.fvu
    needed = "heldout_fvu heldout_l0 dead_fraction tokens seconds tokens_per_second pca_fvu versions"
    assert set(needed.split()) <= summary.keys()
    assert summary["tokens"] == 24 * 32
    for name, tensor in weights_of(folder).items():
        assert torch.equal(tensor, result.sae.state_dict()[name])
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000016", "step-00000024"]
    assert not list(folder.rglob("*.tmp"))


def test_without_an_output_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sk.train(make(), data, progress=False, **OPTIONS).output is None
    assert not list(tmp_path.iterdir())


def interrupt_after(monkeypatch, step):
    """Sends this process a Ctrl-C while it does `step`."""
    original = sk.Trainer.step

    def stepping(trainer, *arguments):
        stats = original(trainer, *arguments)
        if trainer.steps_done == step:
            os.kill(os.getpid(), signal.SIGINT)
        return stats

    monkeypatch.setattr(sk.Trainer, "step", stepping)


@pytest.mark.parametrize("stop", [3, 8, 21])
def test_interrupt_and_resume_give_the_same_bits(data, tmp_path, monkeypatch, stop):
    run(data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop} of 24"):
            run(data, tmp_path / "parts")
    assert not (tmp_path / "parts" / "summary.json").exists()
    run(data, tmp_path / "parts", resume=True)
    mine, theirs = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name

    def untimed(folder):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(folder)]

    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def test_resuming_from_an_older_checkpoint_drops_later_rows(data, tmp_path):
    """A crash loses the steps after the last checkpoint; their rows in metrics.jsonl must not appear twice."""
    run(data, tmp_path / "run")
    expected = weights_of(tmp_path / "run")
    for name in ("step-00000024",):
        for file in (tmp_path / "run" / "checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "run" / "checkpoints" / name).rmdir()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')  # a line that the crash cut short
    run(data, tmp_path / "run", resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [4, 8, 12, 16, 20, 24]
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name])


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    first = run(data, tmp_path / "run").summary
    second = run(data, tmp_path / "run", resume=True).summary
    assert second["heldout_fvu"] == first["heldout_fvu"]
    assert second["steps"] == 24


def test_a_run_is_not_overwritten_by_accident(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(data, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already; resume it, overwrite it"):
        run(data, tmp_path / "run")
    run(data, tmp_path / "run", overwrite=True, steps=8)
    assert len(read_metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_checkpoints_of_another_run_are_refused_by_what_differs(data, tmp_path):
    run(data, tmp_path / "run", steps=8)
    with pytest.raises(CheckpointError, match=r"another configuration \(train.lr: 0.003 there, 0.5 now"):
        run(data, tmp_path / "run", steps=8, lr=0.5, resume=True)
    with pytest.raises(CheckpointError, match=r"sae.d_sae: 32 there, 48 now"):
        sk.train(make(48), data, output=tmp_path / "run", resume=True, progress=False, **{**OPTIONS, "steps": 8})
    with pytest.raises(CheckpointError, match=r"data.data"):
        run(data + 1, tmp_path / "run", steps=8, resume=True)
    run(data, tmp_path / "run", steps=8, log_every=1, resume=True)


def test_missing_and_damaged_checkpoints(data, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        run(data, tmp_path / "none", resume=True)
    run(data, tmp_path / "run", steps=8)
    state = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-00000008 is damaged"):
        run(data, tmp_path / "run", steps=8, resume=True)


def test_a_full_disk_leaves_the_older_checkpoint_whole(data, tmp_path, monkeypatch):
    from sparsekern.training import checkpoint

    original, calls = checkpoint.write_atomically, []

    def filling(path, content):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", filling)
    with pytest.raises(OSError, match="No space left"):
        run(data, tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]
    run(data, tmp_path / "run", resume=True)
    run(data, tmp_path / "whole")
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, weights_of(tmp_path / "whole")[name])


def test_tensorboard_gets_the_metrics(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(data, tmp_path / "run", logger="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("fvu")]
    assert logged == pytest.approx([row["fvu"] for row in read_metrics(tmp_path / "run")])


def test_wandb_gets_the_metrics(data, tmp_path, monkeypatch):
    """With a stand-in for the wandb package: what is called, and with what."""
    logged = []

    class Run:
        def log(self, row, step):
            logged.append((step, row["fvu"]))

        def finish(self):
            logged.append("finished")

    class Wandb:
        @staticmethod
        def init(project, name, dir):
            assert (project, name) == ("sparsekern", "run")
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run(data, tmp_path / "run", logger="wandb")
    assert logged == [(row["step"], row["fvu"]) for row in read_metrics(tmp_path / "run")] + ["finished"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.randn(600, 8), {"batch_size": 5000}, "batch_size must be"),
        (torch.randn(600), {}, "activations must be"),
        (torch.randn(600, 9), {}, r"activations must have 8 columns \(d_in of the SAE\), got 9"),
        (torch.full((600, 8), float("nan")), {}, "not finite"),
        (torch.randn(600, 8), {"step": 3}, "unknown option 'step'; did you mean 'steps'"),
    ],
)
def test_bad_arguments_are_named(data, options, message):
    with pytest.raises(ValueError, match=message):
        sk.train(make(), data, progress=False, **{**OPTIONS, **options})


_ENDLESS = """
import sys, torch, sparsekern as sk
sae = sk.SAE(8, 32, sk.TopK(3), generator=torch.Generator().manual_seed(0))
data = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
sk.train(sae, data, output=sys.argv[1], steps=10**7, batch_size=32, lr=1e-3, log_every=1)
"""


def test_ctrl_c_in_a_real_process(tmp_path, interruptible):
    process = interruptible([sys.executable, "-c", _ENDLESS, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, "the run never began"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "can be resumed" in errors
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == read_metrics(tmp_path)[-1]["step"]


def test_a_transcoder_learns_a_target(data, tmp_path):
    target = data @ torch.randn(8, 5)
    make_one = lambda: sk.Transcoder(8, 32, sk.TopK(3), d_out=5, generator=torch.Generator().manual_seed(0))  # noqa: E731
    options = {**OPTIONS, "lr": 0.03}
    result = sk.train(make_one(), data, target=target, output=tmp_path / "run", progress=False, **options)
    assert result.evaluation.fvu < 0.5
    assert result.summary["pca_fvu"] is None, "what PCA does to the activations says nothing of the target"
    x, wanted = data[-30:], target[-30:]
    error = (result.sae(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert result.evaluation.fvu == pytest.approx(error.item(), rel=1e-4)
    again = sk.train(make_one(), data, target=target, output=tmp_path / "run", resume=True, progress=False, **options)
    assert again.evaluation.fvu == result.evaluation.fvu


def test_a_crosscoder_reads_several(data):
    sources = [data, 10 * data @ torch.randn(8, 8)]
    result = sk.train(sk.Crosscoder(2, 8, 32, sk.TopK(3)), sources, progress=False, **OPTIONS)
    assert result.evaluation.fvu < 0.6
    with pytest.raises(ValueError, match=r"as many rows, got shapes .*600, 8.*599, 8"):
        sk.train(sk.Crosscoder(2, 8, 32, sk.TopK(3)), [data, data[1:]], progress=False, **OPTIONS)
    with pytest.raises(ValueError, match=r"activations must have 13 columns \(d_in and d_out of the SAE\), got 16"):
        sk.train(sk.Transcoder(8, 32, sk.TopK(3), d_out=5), data, target=data, progress=False, **OPTIONS)
