import copy
import errno
import json
import os
import pickle

import pytest
import torch

from sparsekern.data import ActivationStore, ActivationView, StoreError
from sparsekern.data import store as store_module
from sparsekern.data.store import StoreWriter


def edit_manifest(store, change):
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    activations = torch.randn(10, 4)
    ids = torch.tensor([7, 8, 9, -1, 2, 3, 4, 5, 6, 1])
    writer = StoreWriter(tmp_path / "s", dtype=name, d=4, source={"model": "m", "options": (1, 2)})
    writer.add(activations[:7], ids[:7], [3, 4])
    writer.flush(cursor=[0, 1])
    writer.add(activations[7:], ids[7:], [3])
    assert (writer.tokens, writer.contexts, writer.cursor, writer.complete) == (10, 3, [0, 1], False)
    writer.finish()

    store = ActivationStore(tmp_path / "s")
    assert (store.tokens, store.n_contexts, store.d, store.dtype) == (10, 3, 4, dtype)
    assert store.source == {"model": "m", "options": [1, 2]}
    assert store.rows(0, 10).dtype == torch.float32
    assert torch.equal(store.rows(0, 10), activations.to(dtype).float())
    assert torch.equal(store.rows(5, 9), activations[5:9].to(dtype).float())  # across the shard border
    assert store.rows(10, 10).shape == (0, 4)
    assert store.token_ids.dtype == torch.int32
    assert store.token_ids.tolist() == ids.tolist()
    assert store.context_bounds.tolist() == [0, 3, 7, 10]
    assert store.context_bounds.dtype == torch.int64
    assert sorted(file.name for file in store.path.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_rows_do_not_alias_the_file(make_store):
    store = make_store()
    before = store.rows(0, 4)
    store.rows(0, 4).zero_()
    assert torch.equal(store.rows(0, 4), before)


def test_rows_out_of_range(make_store):
    store = make_store()
    for start, stop in [(-1, 2), (3, 2), (0, store.tokens + 1)]:
        with pytest.raises(ValueError, match="start and stop"):
            store.rows(start, stop)


def test_few_handles_are_kept_open(make_store, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_OPEN_SHARDS", 2)
    store = make_store(contexts=20, per_shard=2)
    everything = store.rows(0, store.tokens)
    assert torch.equal(torch.cat([store.rows(row, row + 1) for row in range(store.tokens)]), everything)
    assert len(store._handles) == 2


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_copies_open_their_own_files(make_store, copier):
    store = make_store()
    expected = store.rows(0, store.tokens)
    assert torch.equal(copier(store).rows(0, store.tokens), expected)
    train, _ = store.split(0.25)
    assert torch.equal(copier(train).load(), train.load())


# ---- what can be wrong with a store


def test_missing_and_incomplete(tmp_path):
    with pytest.raises(StoreError, match="no activation store"):
        ActivationStore(tmp_path / "nowhere")
    writer = StoreWriter(tmp_path / "s", dtype="float32", d=2, source={})
    writer.add(torch.ones(3, 2), torch.zeros(3), [3])
    writer.flush()
    with pytest.raises(StoreError, match=r"incomplete: 3 tokens .* resume"):
        ActivationStore(tmp_path / "s")


def test_truncated_shard(make_store):
    store = make_store()
    shard = store.path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors is truncated .*harvest again"):
        ActivationStore(store.path, verify=False)


def test_flipped_bit(make_store):
    store = make_store()
    shard = store.path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors is corrupted"):
        ActivationStore(store.path)
    ActivationStore(store.path, verify=False)


def test_header_that_disagrees_with_the_manifest(make_store):
    store = make_store()
    edit_manifest(store, lambda manifest: manifest.update(d=2))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors holds activations"):
        ActivationStore(store.path).rows(0, 1)


def test_missing_shard(make_store):
    store = make_store()
    (store.path / "shard-00002.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors is missing"):
        ActivationStore(store.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(format="else"), "not the manifest"),
        (lambda m: m.pop("d"), "d is missing"),
        (lambda m: m.update(dtype="int8"), "unknown dtype"),
        (lambda m: m.update(tokens=1), "not the sum"),
        (lambda m: m["shards"][0].update(file="../x"), "'../x' is not the name of a shard"),
        (lambda m: m["shards"][0].update(file="sub/shard-00000.safetensors"), "is not the name of a shard"),
        (lambda m: m["shards"][0].update(bytes="many"), "bytes of a shard"),
        (lambda m: m["shards"].append(3), "an entry of shards"),
    ],
)
def test_bad_manifest(make_store, change, message):
    store = make_store()
    edit_manifest(store, change)
    with pytest.raises(StoreError, match=message):
        ActivationStore(store.path)


def test_manifest_that_is_not_json(make_store):
    store = make_store()
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        ActivationStore(store.path)


# ---- writing


def test_writer_continues_behind_the_last_sound_shard(make_store):
    store = make_store(contexts=12, per_shard=3)
    (store.path / "shard-00002.safetensors").write_bytes(b"")
    (store.path / "shard-00003.safetensors.tmp").write_bytes(b"left by a kill")
    writer = StoreWriter(store.path, dtype="float32", d=3, source={"kind": "test"})
    assert not writer.complete
    assert writer.cursor == 6
    assert writer.contexts == 6
    assert not list(store.path.glob("*.tmp"))


def test_writer_reuses_a_complete_store(make_store):
    store = make_store()
    writer = StoreWriter(store.path, dtype="float32", d=3, source={"kind": "test"})
    assert writer.complete
    assert writer.tokens == store.tokens


def test_writer_refuses_another_source(make_store):
    store = make_store()
    with pytest.raises(StoreError, match="kind is 'test' there and 'else' here; new is None there and 1 here"):
        StoreWriter(store.path, dtype="float32", d=3, source={"kind": "else", "new": 1})
    with pytest.raises(StoreError, match="dtype is 'float32' there and 'float16' here"):
        StoreWriter(store.path, dtype="float16", d=3, source={"kind": "test"})


def test_writer_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(StoreError, match="not empty"):
        StoreWriter(tmp_path, dtype="float32", d=3, source={})
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter(tmp_path / "thesis.txt", dtype="float32", d=3, source={})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])  # 1e5 is infinite in float16
def test_writer_names_the_first_row_that_is_not_finite(tmp_path, bad):
    writer = StoreWriter(tmp_path / "s", dtype="float16", d=2, source={})
    writer.add(torch.ones(4, 2), torch.zeros(4), [1, 3])
    activations = torch.ones(6, 2)
    activations[3, 1] = bad
    with pytest.raises(ValueError, match=r"row 7 \(context 3\) .* float16"):
        writer.add(activations, torch.zeros(6), [2, 4])


def test_writer_checks_shapes(tmp_path):
    writer = StoreWriter(tmp_path / "s", dtype="float32", d=2, source={})
    for activations, ids, lengths in [
        (torch.ones(3, 4), torch.zeros(3), [3]),
        (torch.ones(3, 2), torch.zeros(2), [3]),
        (torch.ones(3, 2), torch.zeros(3), [2]),
    ]:
        with pytest.raises(ValueError, match="disagree"):
            writer.add(activations, ids, lengths)
    with pytest.raises(ValueError, match="at least 1"):
        writer.add(torch.ones(3, 2), torch.zeros(3), [3, 0])
    with pytest.raises(StoreError, match="no activation"):
        writer.finish()
    with pytest.raises(ValueError, match="dtype must be"):
        StoreWriter(tmp_path / "t", dtype="int8", d=2, source={})


def test_write_error_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = StoreWriter(tmp_path / "s", dtype="float32", d=2, source={})
    writer.add(torch.ones(3, 2), torch.zeros(3), [3])
    writer.flush()
    writer.add(torch.ones(4, 2), torch.zeros(4), [4])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"disk is full.* 3 tokens are safely stored.*resume"):
        writer.flush()
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["manifest.json", "shard-00000.safetensors"]


# ---- contexts as text


@pytest.mark.parametrize(
    ("vocab", "text", "marked"),
    [
        (["the", "cat", "##s", "sat", "."], "the cats sat .", "the cat<s> sat ."),
        (["The", "Ġcat", "s", "Ġsat", "##"], "The cats sat##", "The cat<s> sat##"),
        (["▁The", "▁cat", "s", "▁sat", "."], "The cats sat.", "The cat<s> sat."),
    ],
)
def test_context_text(tmp_path, vocab, text, marked):
    writer = StoreWriter(tmp_path / "s", dtype="float32", d=1, source={}, vocab=vocab)
    writer.add(torch.ones(7, 1), torch.tensor([0, 1, 0, 1, 2, 3, 4]), [2, 5])
    writer.finish()
    store = ActivationStore(tmp_path / "s")
    assert store.context_text(1) == text
    assert store.context_text(1, mark=2, marks=("<", ">")) == marked
    assert store.context_text(1, mark=1).count(" **⟦cat⟧**") == 1
    assert store.context_text(1, mark=0).startswith("**⟦")
    assert store.context_text(1, mark=2, marks=("<", ">"), window=1).startswith("… cat")
    assert store.context_text(1, mark=0, window=0).endswith(" …")
    assert [store.word_text(row) for row in (1, 3, 4)] == ["cat", "cats", "cats"]  # the first ends its context
    with pytest.raises(ValueError, match="mark must be in 0 … 4"):
        store.context_text(1, mark=5)
    with pytest.raises(ValueError, match="context must be in 0 … 1"):
        store.context_text(2)


def test_context_text_without_vocabulary(make_store):
    store = make_store()
    ids = store.token_ids[: store.context_bounds[1]].tolist()
    assert store.context_text(0) == " ".join(map(str, ids))


def test_damaged_vocabulary(make_store):
    store = make_store(vocab=["a"])
    (store.path / "vocab.json").write_text('{"a": 1}')
    with pytest.raises(StoreError, match=r"vocab\.json is not a list"):
        store.context_text(0)


# ---- views


def test_split_is_by_contexts_and_deterministic(make_store):
    store = make_store(contexts=40)
    train, held_out = store.split(0.25, seed=3)
    assert held_out.n_contexts == 10
    assert sorted(train.contexts.tolist() + held_out.contexts.tolist()) == list(range(40))
    assert sorted(train.row_ids.tolist() + held_out.row_ids.tolist()) == list(range(store.tokens))
    again = store.split(0.25, seed=3)
    assert torch.equal(again[1].contexts, held_out.contexts)
    assert not torch.equal(store.split(0.25, seed=4)[1].contexts, held_out.contexts)


def test_split_leaves_a_context_on_each_side(make_store):
    store = make_store(contexts=2)
    for held_out in (0.001, 0.999):
        assert [view.n_contexts for view in store.split(held_out)] == [1, 1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        store.split(0.0)
    with pytest.raises(StoreError, match="only one context"):
        make_store(contexts=1, name="one").split()


def test_view_rows_are_in_the_order_of_row_ids(make_store):
    store = make_store()
    view = ActivationView(store, torch.tensor([7, 2, 11]))
    assert view.tokens == view.row_ids.numel() == int(view.lengths.sum())
    assert torch.equal(view.load(), store.rows(0, store.tokens)[view.row_ids])
    assert torch.equal(view.load(max_tokens=5), view.load()[:5])
    assert torch.equal(view.load(max_tokens=10**6), view.load())
    with pytest.raises(ValueError, match="max_tokens"):
        view.load(max_tokens=0)
