"""DistributedDataParallel on two processes, against one process with the whole batch."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# These select or balance over what they are given: a rank has its own half.
BY_RANK = {"batchtopk", "matryoshka", "switch", "hierarchy", "h_sae"}


@pytest.fixture(scope="module")
def ranks(every_architecture, tmp_path_factory):
    """What each of the two ranks found, and the modules and batches that they had."""
    folder, work = tmp_path_factory.mktemp("ranks"), {}
    for architecture in every_architecture:
        sae, (x, *target) = architecture.used(), architecture.batch(32)
        sae.dead_after = 10**6
        work[architecture.name] = (sae, x, target[0] if target else None)
    (folder / "work.pickle").write_bytes(pickle.dumps(work))
    worker = Path(__file__).with_name("distributed_worker.py")
    processes = [subprocess.Popen([sys.executable, worker, folder, str(rank)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads((folder / f"found.{rank}").read_bytes()) for rank in (0, 1)], work


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_those_of_the_whole_batch_and_parameters_stay_equal(ranks, architecture):
    (first, second), work = ranks
    first, second = first[architecture.name], second[architecture.name]
    for what in ("forward", "loss"):
        assert all(torch.equal(first[what][name], second[what][name]) for name in first[what])
    sae, x, target = work[architecture.name]
    trained = [name for name, _ in sae.named_parameters()]
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in trained)
    assert any(not torch.equal(first["after"][name], parameter) for name, parameter in sae.named_parameters())
    whole = copy.deepcopy(sae)
    (whole(x) - (x if target is None else target)).square().mean().backward()
    if architecture.name not in ("batchtopk", "matryoshka"):
        assert_same(first["forward"], {name: p.grad for name, p in whole.named_parameters() if p.grad is not None})
    whole.zero_grad()
    whole.loss(x, target).total.backward()
    if architecture.name not in BY_RANK:
        assert_same(first["loss"], {name: p.grad for name, p in whole.named_parameters() if p.grad is not None})


def test_counters_are_those_of_the_first_rank(ranks, architecture):
    (first, second), work = ranks
    first, second = first[architecture.name], second[architecture.name]
    sae, x, target = work[architecture.name]
    alone = copy.deepcopy(sae)
    half = x.chunk(2)[0], None if target is None else target.chunk(2)[0]
    alone.loss(*half)
    most = int(alone.tokens_since_fired.max()) + len(half[0])
    for state in (first["after"], second["after"]):
        assert int(state["tokens_since_fired"].max()) <= most, "a rank counts its own tokens"
    assert any(not torch.equal(first["after"][name], second["after"][name]) for name in first["after"])
    for name, tensor in first["synchronized"].items():
        assert torch.equal(tensor, first["after"][name]), name
        assert torch.equal(tensor, second["synchronized"][name]), name  # sent at the start of each forward pass
