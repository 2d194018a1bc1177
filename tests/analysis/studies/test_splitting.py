"""The study of splitting writes what it promises, and deals children out to topics as it says."""

import json
import re

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis.splitting import split_map
from sparsekern.analysis.studies.options import SplittingOptions
from sparsekern.analysis.studies.saes import _measured
from sparsekern.analysis.studies.splitting import _children_by_topic, _permuted_contexts, _tokens_by_topic, study


def test_a_quick_study_writes_a_page_pictures_and_numbers(store, tmp_path):
    options = SplittingOptions(quick=True, device="cpu", topics=3, cos=0.3, refit_steps=5)
    written = study(store, options, tmp_path / "out", progress=False)
    page = written[0].read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written} == {"page.md", "results.json", *shown}
    assert {"children.png", "topics.png"} <= set(shown)
    assert "{" not in page
    assert "`word" in page
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert set(record["maps"]) == {"32-64", "64-128"}
    against = {entry["against"] for entry in record["topics"]["gap"]}
    assert against == {
        "topics permuted within parents",
        "parents rotated",
        "topics of contexts permuted",
        "activations themselves",
    }
    assert record["why_not_found"]["verdict"] in ("optimisation", "width", "sparsity")
    with pytest.raises(ValueError, match="latents must name two widths at least"):
        study(store, SplittingOptions(latents=[32]), tmp_path / "other", progress=False)


def test_children_get_the_topic_that_their_tokens_have_more_of():
    # One parent, two children at cosines of 0.8; x is along one child or the other, in two topics.
    small, large = sk.SAE(3, 1, sk.TopK(1), pre_bias=False), sk.SAE(3, 2, sk.TopK(1), pre_bias=False)
    rows = torch.tensor([[0.8, 0.6, 0.0], [0.8, -0.6, 0.0]])
    with torch.no_grad():
        small.W_dec.copy_(torch.tensor([[1.0, 0, 0]]))
        for weight in (large.W_enc, large.W_dec):
            weight.copy_(rows)
        large.b_enc.zero_()
    which = torch.tensor([0] * 10 + [1] * 10)
    topics = torch.tensor([0] * 8 + [1] * 2 + [1] * 7 + [0] * 3)
    one = _measured(large, 0, rows[which])
    assert torch.equal(_tokens_by_topic(one, topics, 2), torch.tensor([[8.0, 2], [3, 7]]).double())
    found = split_map(small.W_dec.detach(), rows, n_null=0)
    assert _children_by_topic(found, one, topics, 2).tolist() == [[0, 1]]
    assert _children_by_topic(found, one, 1 - topics, 2).tolist() == [[1, 0]]
    assert _children_by_topic(found, one, torch.zeros(20).long(), 2)[0, 1] == -1


def test_topics_stay_with_whole_contexts_when_they_are_permuted():
    contexts = torch.tensor([4, 4, 9, 9, 9, 11, 12])
    topics = torch.tensor([0, 0, 1, 1, 1, 2, 3])
    drawn = [_permuted_contexts(topics, contexts, torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert any(not torch.equal(one, topics) for one in drawn)
    for one in drawn:
        assert one[0] == one[1]
        assert len(one[2:5].unique()) == 1
        assert sorted({int(one[0]), int(one[2]), int(one[5]), int(one[6])}) == [0, 1, 2, 3]
