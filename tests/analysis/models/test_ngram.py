"""Kneser–Ney n-grams."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from sparsekern.analysis.models.ngram import KneserNey


def bigrams_by_definition(ids, vocab, history, word):
    """Interpolated Kneser–Ney bigram probability, written out with dictionaries."""
    pairs = Counter(pairwise(ids))
    before = defaultdict(set)
    for first, second in pairs:
        before[second].add(first)

    def discount(counts):
        once, twice = (sum(count == times for count in counts) for times in (1, 2))
        return once / max(once + 2 * twice, 1)

    kinds = {word: len(words) for word, words in before.items()}
    d1 = discount(kinds.values())
    total = sum(kinds.values())
    unigram = (max(kinds.get(word, 0) - d1, 0) + d1 * len(kinds) / vocab) / total
    d2 = discount(pairs.values())
    after = {second: count for (first, second), count in pairs.items() if first == history}
    if not after:
        return unigram
    return (max(after.get(word, 0) - d2, 0) + d2 * len(after) * unigram) / sum(after.values())


def test_bigrams_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    ids = (generator.random(300) ** 2 * 12).astype(np.int64)
    asked = generator.integers(0, 12, 200)
    model = KneserNey(ids, 12, 2)
    wanted = [bigrams_by_definition(ids.tolist(), 12, a, b) for a, b in pairwise(asked)]
    np.testing.assert_allclose(model.probabilities(asked), wanted, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_add_up_after_seen_and_unseen_contexts(order):
    ids = np.random.default_rng(1).integers(0, 7, 60)
    model = KneserNey(ids, 8, 3)  # token 7 was never seen
    for context in [(0, 1), (7, 7), (2, 7)]:
        total = sum(model.probabilities(np.array([*context, word]), order)[0] for word in range(8))
        assert total == pytest.approx(1)


def test_longer_ngrams_win_on_text_with_a_memory():
    generator = np.random.default_rng(2)
    ids = [0, 1]
    for _ in range(4000):
        ids.append((ids[-1] + 2 * ids[-2] + int(generator.random() < 0.2)) % 11)
    train, held_out = np.array(ids[:3000]), np.array(ids[3000:])
    model = KneserNey(train, 11, 3)
    losses = [-np.log(model.probabilities(held_out, order)).mean() for order in (1, 2, 3)]
    assert losses[2] < 0.8  # the noise alone is 0.5
    assert min(losses[:2]) > 2.3  # ln 11 = 2.40: one token says nothing about the next


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="order must be at least 1"):
        KneserNey(np.arange(9), 2048, 6)
    with pytest.raises(ValueError, match=r"ids must be at least 2 tokens in \[0, 4\)"):
        KneserNey(np.arange(9), 4, 2)
