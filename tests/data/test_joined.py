"""Several stores of the same tokens, side by side."""

import pytest
import torch

from sparsekern.data import ActivationLoader, ActivationStore, JoinedStore, StoreWriter


def write(path, x, token_ids, lengths):
    writer = StoreWriter(path, d=x.shape[1], dtype="float32", source={"hook": path.name}, shard_tokens=10)
    writer.add(x, token_ids, lengths)
    writer.finish()
    return ActivationStore(path)


@pytest.fixture
def stores(tmp_path):
    ids, lengths = torch.arange(17, dtype=torch.int32), [4, 8, 5]
    return [write(tmp_path / name, torch.randn(17, d), ids, lengths) for name, d in (("a", 3), ("b", 5))]


def test_rows_stand_side_by_side(stores):
    joined = JoinedStore(stores)
    assert (joined.d, joined.tokens, joined.n_contexts) == (8, 17, 3)
    assert joined.source["hook"] == "a, b"
    assert torch.equal(joined.rows(2, 15), torch.cat([store.rows(2, 15) for store in stores], 1))
    training, held_out = joined.split(0.3, seed=1)
    assert torch.equal(held_out.load(), torch.cat([store.split(0.3, seed=1)[1].load() for store in stores], 1))
    assert training.d == 8


def test_a_loader_gives_the_same_tokens_of_all(stores):
    joined = ActivationLoader(JoinedStore(stores), 6, seed=2)
    alone = [ActivationLoader(store, 6, seed=2) for store in stores]
    for t in range(5):
        assert torch.equal(joined.batch(t), torch.cat([loader.batch(t) for loader in alone], 1))


def test_other_data_is_another_fingerprint(stores):
    def digest(*joined):
        return ActivationLoader(JoinedStore(joined), 6).state_dict()["fingerprint"]["data"]

    assert digest(*stores) != digest(*stores[::-1])


def test_stores_of_other_tokens_are_refused(stores, tmp_path):
    x, ids = torch.randn(17, 3), torch.arange(17, dtype=torch.int32)
    for name, tokens, lengths in (("c", ids + 1, [4, 8, 5]), ("d", ids, [8, 4, 5])):
        with pytest.raises(ValueError, match=r"is not of the same tokens as .*harvest the same texts"):
            JoinedStore([stores[0], write(tmp_path / name, x, tokens, lengths)])
    with pytest.raises(ValueError, match="at least one store"):
        JoinedStore([])
