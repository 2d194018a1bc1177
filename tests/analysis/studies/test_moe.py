"""The study of a mixture of experts: its labels, its tokens, and that it writes what it promises."""

import json
import re

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis.studies.moe import _kmeans_rows, study
from sparsekern.analysis.studies.options import MoeOptions
from sparsekern.analysis.tokens import HeldOut, over_represented
from sparsekern.data import ActivationStore, StoreWriter


def test_held_out_tokens_know_where_they_come_from(store):
    held_out = HeldOut.of(store, 0.2, 0, 300)
    assert len(held_out.x) == 300
    for index in (0, 23, 24, 299):
        row = int(held_out.rows[index])
        torch.testing.assert_close(held_out.x[index], store.rows(row, row + 1)[0])
        assert held_out.tokens[index] == store.token_ids[row]
        assert held_out.contexts[index] == row // 24
        assert held_out.positions[index] == row % 24
    training = store.split(0.2, 0)[0].row_ids
    assert not torch.isin(held_out.rows, training).any()


def test_labels_are_token_position_and_context(store):
    held_out = HeldOut.of(store, 0.2, 0, 300)
    labels = held_out.labels()
    assert set(labels) == {"token", "position", "context"}
    assert torch.equal(labels["token"], held_out.tokens)  # all of the 50 are frequent
    first = labels["position"][:24].tolist()
    assert first == [0, 1, 1, *[2] * 4, *[3] * 8, *[4] * 9]
    # 300 tokens are twelve whole contexts and half of one, which is too short to be a label
    assert (labels["context"] == -1).sum() == 300 % 24
    assert len(labels["context"].unique()) == 13


def test_the_most_frequent_tokens_are_labels_and_unknown_ones_are_not():
    tokens = torch.cat([torch.arange(300).repeat(2), torch.arange(100), torch.full((50,), -1)])
    n = len(tokens)
    held_out = HeldOut(torch.zeros(n, 1), torch.arange(n), tokens, torch.zeros(n).long(), torch.arange(n))
    labels = held_out.labels()
    kept = labels["token"].unique()
    assert len(kept) == 201
    assert kept[0] == -1
    assert set(range(100)) <= set(kept.tolist())  # those seen three times
    assert "context" not in labels  # one context is no contrast


def test_over_represented_tokens_by_their_part_of_the_mutual_information():
    experts = torch.tensor([0] * 40 + [1] * 60)
    tokens = torch.cat([torch.full((20,), 7), torch.full((20,), 8), torch.full((10,), 7), torch.full((50,), 9)])
    found = over_represented(experts, tokens, 0)
    assert [(token.token, token.here, token.in_all) for token in found] == [(8, 20, 20), (7, 20, 30)]
    assert found[0].score == pytest.approx(20 * torch.tensor(20 * 100 / (20 * 40)).log().item())
    assert over_represented(experts, tokens, 0, least=21) == []
    assert over_represented(experts, torch.full((100,), -1), 0) == []
    assert over_represented(experts, tokens, 2) == []


def test_a_quick_study_writes_a_page_pictures_and_numbers(store, tmp_path):
    written = study(store, MoeOptions(quick=True, device="cpu"), tmp_path / "out", progress=False)
    assert written[0].name == "page.md"
    page = written[0].read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {"loads.png", "agreement.png", "measures.png", "tree.png", "similarities.png", "toy.png"} == set(shown)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert "{" not in page
    assert "nan" not in page.lower().split()
    assert page.count("- expert 0: ") == 2
    assert "the router started at clusters of the first batch" in page
    assert "`word" in page
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert len(record["arms"]) == 7
    starts = {
        name: sk.SwitchSAE.from_pretrained(tmp_path / "out" / "runs" / name / "sae").router_start
        for name in ("switch", "switch-random-start", "switch-no-balancing")
    }
    assert starts == {"switch": "kmeans", "switch-random-start": "random", "switch-no-balancing": "kmeans"}
    assert record["geometry"]["tokens"] == 120
    assert sum(record["geometry"]["loads"]) == 120
    assert {entry["kind"] for entry in record["geometry"]["results"]} == {"null", "control"}
    random = sk.SwitchSAE.from_pretrained(tmp_path / "out" / "runs" / "fixed-random-router" / "sae")
    fresh = sk.SwitchSAE(16, 128, sk.TopK(4), n_experts=4, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(random.W_router, fresh.W_router)
    torch.testing.assert_close(cosine, torch.ones(4))  # a fixed router is scaled at the start and never turned
    fixed = sk.SwitchSAE.from_pretrained(tmp_path / "out" / "runs" / "fixed-k-means-router" / "sae")
    rows = _kmeans_rows(store, MoeOptions(quick=True, device="cpu").resolved(16))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(fixed.W_router, rows), torch.ones(4))


def test_a_trained_module_is_studied_as_it_is(store, tmp_path):
    sae = sk.SwitchSAE(16, 64, sk.TopK(3), n_experts=4, generator=torch.Generator().manual_seed(0))
    sae.save_pretrained(tmp_path / "sae")
    options = MoeOptions(quick=True, sae=str(tmp_path / "sae"), toy=False, device="cpu")
    page = study(store, options, tmp_path / "out", progress=False)[0].read_text()
    assert "SwitchSAE, loaded; k = 3" in page
    assert "Where the answer is known" not in page
    assert not (tmp_path / "out" / "runs").exists()
    sk.SwitchSAE(8, 64, sk.TopK(3), n_experts=4).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="sae must be a SwitchSAE of width 16, got SwitchSAE of width 8"):
        study(store, MoeOptions(quick=True, sae=str(tmp_path / "narrow")), tmp_path / "other", progress=False)


def test_activations_without_tokens_can_be_studied(tmp_path):
    x = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"kind": "import"})
    writer.add(x, torch.full((900,), -1), [10] * 90)
    writer.finish()
    options = MoeOptions(quick=True, controls=False, toy=False, device="cpu")
    page = study(ActivationStore(tmp_path / "acts"), options, tmp_path / "out", progress=False)[0].read_text()
    assert "What each expert responds to" not in page
    assert "position" in page
    assert "with other routers" not in page
