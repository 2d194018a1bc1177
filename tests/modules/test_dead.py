"""Rows of the dead latents in a size known beforehand, and the bound on their number that is asked for in advance."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekern.modules.dead import LOOKAHEAD, DeadBound, dead_rows


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 9))
def test_rows_come_in_order_and_the_places_beyond_them_are_marked(mask, more):
    dead = [latent for latent, is_dead in enumerate(mask) if is_dead]
    exact = dead_rows(torch.tensor(mask), None)
    assert exact.rows.tolist() == dead
    assert exact.used is None
    padded = dead_rows(torch.tensor(mask), len(dead) + more)
    assert padded.rows.tolist() == dead + [0] * more
    assert padded.used.tolist() == [True] * len(dead) + [False] * more


@pytest.fixture
def device(monkeypatch):
    """Stands in for a GPU: the answers on their way from it, and in which order they were waited for."""

    class Device:
        answers, waited = [], []

    class Event:
        def record(self):
            self.number = len(Device.answers) - 1

        def synchronize(self):
            Device.waited.append(self.number)

    def empty(*args, pin_memory, **options):
        assert pin_memory  # or else the copy waits
        Device.answers.append(torch_empty(*args, **options))
        return Device.answers[-1]

    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Device


def test_a_bound_is_the_answer_to_an_old_question(device):
    bound, counters, found = DeadBound(), torch.zeros(50, dtype=torch.int64), []
    for step in range(LOOKAHEAD + 4):
        found.append(bound.bound(counters, 1000))
        counters += 10
        bound.ask(counters, 1000, 10)
        device.answers[-1].fill_(5 * step)
    assert found == [0] * LOOKAHEAD + [0, 8, 16, 16]
    assert device.waited == [0, 1, 2, 3]


def test_growing_batches_are_counted_at_once(device):
    bound, counters = DeadBound(), torch.zeros(50, dtype=torch.int64)
    counters[:3] = 1000
    for batch in [10] + (LOOKAHEAD - 1) * [100]:
        bound.ask(counters, 1000, batch)
    device.answers[0].fill_(50)  # which held for batches of ten
    assert bound.bound(counters, 1000) == 4
    assert device.waited == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([4, 4, 4, 4, 4, 1, 9]), min_size=10, max_size=40),
    st.integers(1, 60),
    st.floats(0, 0.3),
    st.sets(st.integers(0, 39), max_size=2),
    st.integers(0, 2**31),
)
def test_the_bound_holds(device, batches, dead_after, firing, meddled, seed):
    generator = torch.Generator().manual_seed(seed)
    bound, counters = DeadBound(), torch.zeros(20, dtype=torch.int64)
    for step, batch in enumerate(batches):
        if step in meddled:
            counters[::2] = dead_after
        found, dead = bound.bound(counters, dead_after), int((counters >= dead_after).sum())
        assert found >= dead
        assert found & (found - 1) == 0
        counters += batch
        counters.masked_fill_(torch.rand(20, generator=generator) < firing, 0)
        bound.ask(counters, dead_after, batch)


def test_a_copy_asks_anew(device):
    bound, counters = DeadBound(), torch.zeros(5, dtype=torch.int64)
    for _ in range(LOOKAHEAD):
        bound.ask(counters, 10, 1)
        device.answers[-1].fill_(5)
    other = copy.deepcopy(bound)
    assert other.bound(counters, 10) == 0
    assert bound.bound(counters, 10) == 8
