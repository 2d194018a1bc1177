import itertools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekern.data import ActivationLoader, ActivationView

properties = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def numbered(rows):
    """Rows that say which they are."""
    return torch.arange(rows, dtype=torch.float32)[:, None].repeat(1, 2)


@st.composite
def settings_of_a_loader(draw):
    rows = draw(st.integers(1, 900))  # up to four contexts of 256 rows
    return {
        "data": numbered(rows),
        "batch_size": draw(st.integers(1, rows)),
        "seed": draw(st.integers(0, 2**40)),
        "buffer_tokens": draw(st.integers(1, 2000)),
    }


def check_even_visits(loader):
    """After any buffer each row was seen as often as any other, give or take the epoch that has begun."""
    per_buffer = loader._batches_per_buffer
    seen = Counter(dict.fromkeys(range(loader.tokens), 0))
    for buffer in range(6):
        for t in range(buffer * per_buffer, (buffer + 1) * per_buffer):
            seen.update(loader.batch(t)[:, 0].int().tolist())
        rows = (buffer + 1) * per_buffer * loader.batch_size
        whole, rest = divmod(rows, loader.tokens)
        assert sorted(seen.values()) == [whole] * (loader.tokens - rest) + [whole + 1] * rest


@properties
@given(settings_of_a_loader())
def test_an_epoch_visits_every_row_once(kwargs):
    check_even_visits(ActivationLoader(**kwargs))


@properties
@given(settings_of_a_loader(), st.data())
def test_a_batch_does_not_depend_on_the_order_of_access(kwargs, data):
    in_order = list(itertools.islice(ActivationLoader(**kwargs), 12))
    loader = ActivationLoader(**kwargs)
    for t in data.draw(st.permutations(range(12))):
        assert torch.equal(loader.batch(t), in_order[t])


@properties
@given(settings_of_a_loader(), st.integers(0, 10))
def test_resuming_is_continuing(kwargs, stop):
    loader = ActivationLoader(**kwargs)
    list(itertools.islice(loader, stop))
    state = loader.state_dict()
    assert state["position"] == stop
    resumed = ActivationLoader(**kwargs)
    resumed.load_state_dict(state)
    for expected, batch in itertools.islice(zip(loader, resumed, strict=True), 5):
        assert torch.equal(batch, expected)


def test_a_store_with_uneven_contexts_is_visited_evenly(make_store):
    store = make_store(contexts=30, per_shard=7)
    rows = store.rows(0, store.tokens)
    number = {tuple(row): index for index, row in enumerate(rows.tolist())}
    loader = ActivationLoader(store, 7, buffer_tokens=28)
    epochs = torch.cat([loader.batch(t) for t in range(4 * loader.tokens)])  # 28 whole epochs
    assert Counter(number[tuple(row)] for row in epochs.tolist()) == Counter(dict.fromkeys(range(store.tokens), 28))


def test_a_view_gives_its_own_rows_only(make_store):
    store = make_store(contexts=30)
    train, held_out = store.split(0.3)
    rows = {tuple(row) for row in train.load().tolist()}
    loader = ActivationLoader(train, 5, buffer_tokens=20)
    seen = {tuple(row) for batch in itertools.islice(loader, train.tokens) for row in batch.tolist()}
    assert seen == rows
    assert loader.tokens == train.tokens
    with pytest.raises(ValueError, match="data was"):
        ActivationLoader(held_out, 5).load_state_dict(ActivationLoader(train, 5).state_dict())


def test_rows_are_shuffled_differently_each_epoch():
    loader = ActivationLoader(numbered(512), 512)
    first, second = loader.batch(0), loader.batch(1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, numbered(512))
    assert not torch.equal(first, ActivationLoader(numbered(512), 512, seed=1).batch(0))


def test_a_batch_belongs_to_the_caller():
    loader = ActivationLoader(numbered(10), 5)
    before = loader.batch(0)
    loader.batch(0).zero_()
    assert torch.equal(loader.batch(0), before)


def test_the_buffer_is_no_larger_than_needed():
    assert ActivationLoader(numbered(1000), 300)._batches_per_buffer == 4
    assert ActivationLoader(numbered(1000), 100, buffer_tokens=260)._batches_per_buffer == 3
    assert ActivationLoader(numbered(1000), 300, buffer_tokens=1)._batches_per_buffer == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_batches_are_float32(dtype):
    batch = ActivationLoader(numbered(8).to(dtype), 4).batch(0)
    assert batch.dtype == torch.float32
    assert batch.shape == (4, 2)


def test_resuming_with_other_settings():
    state = ActivationLoader(numbered(100), 10, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1 and is 2; batch_size was 10 and is 20"):
        ActivationLoader(numbered(100), 20, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="data was"):
        ActivationLoader(numbered(100) + 1, 10, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(5), "floating-point tensor"),
        (torch.ones(5, 2, dtype=torch.int64), "floating-point tensor"),
        (torch.ones(0, 2), "empty"),
        (torch.tensor([[1.0], [2.0], [float("nan")]]), "first at row 2"),
        (torch.tensor([[1.0], [1e300]], dtype=torch.float64), "first at row 1"),
        ([1.0], "not list"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        ActivationLoader(data, 1)


def test_bad_settings(make_store):
    for kwargs in ({"batch_size": 11}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="batch_size must be in 1 … 10"):
            ActivationLoader(numbered(10), **kwargs)
    with pytest.raises(ValueError, match="seed"):
        ActivationLoader(numbered(10), 5, seed=-1)
    with pytest.raises(ValueError, match="buffer_tokens"):
        ActivationLoader(numbered(10), 5, buffer_tokens=0)
    with pytest.raises(ValueError, match="t must not"):
        ActivationLoader(numbered(10), 5).batch(-1)
    with pytest.raises(ValueError, match="no contexts"):
        ActivationLoader(ActivationView(make_store(), torch.empty(0, dtype=torch.int64)), 5)
