"""Saving and loading: what comes back, and what is refused."""

import json

import pytest
import torch

import sparsekern as sk


@pytest.fixture
def saved(tmp_path):
    sae = sk.SAE(6, 20, sk.TopK(3), pre_bias=False, dead_after=77, aux_k=4)
    sae.loss(torch.randn(8, 6))
    sae.save_pretrained(tmp_path / "sae")
    return sae, tmp_path / "sae"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    sae = sk.SAE(6, 20, sk.TopK(3), pre_bias=False, dead_after=77, aux_k=4, dtype=dtype)
    sae.save_pretrained(tmp_path)
    loaded = sk.SAE.from_pretrained(tmp_path)
    assert loaded.config() == sae.config()
    assert loaded.W_enc.dtype == dtype
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_files_are_safetensors_and_json_and_nothing_else(saved):
    _, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["activation"] == {
        "name": "topk",
        "k": 3,
        "screen": "auto",
        "multi_k": None,
        "multi_coefficient": 0.125,
    }


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 50), "damaged or does not fit"),
        (lambda f: edit(f, d_sae=21), "damaged or does not fit"),
        (lambda f: edit(f, format=99), "not of format 1"),
        (lambda f: edit(f, dtype="load"), "dtype must be one of"),
        (
            lambda f: edit(f, activation={"name": "softmax"}),
            "activation must be one of topk, abstopk, .*, got 'softmax'",
        ),
        (lambda f: edit(f, colour="red"), "does not fit SAE.*colour"),
        (lambda f: edit(f, **{"class": "Thing"}), "of class 'Thing', not SAE"),
    ],
)
def test_damaged_folders_are_refused(saved, spoil, message):
    _, folder = saved
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        sk.SAE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "../elsewhere", "nothing"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        sk.SAE.from_pretrained(name)


def test_hub_ids_are_downloaded_without_anything_else(saved, monkeypatch):
    sae, folder = saved
    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(folder)

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = sk.SAE.from_pretrained("someone/some-sae")
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert asked == {"repo": "someone/some-sae", "patterns": ["config.json", "model.safetensors"]}
