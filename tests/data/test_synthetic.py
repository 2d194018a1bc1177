"""Made activations have the properties that they are made for."""

import pytest
import torch

from sparsekern.data import zipf_activations
from sparsekern.data.synthetic import zipf_draws


def test_seed_determines_the_tokens_and_a_longer_draw_begins_with_a_shorter():
    one, two = zipf_activations(5000, 16, features=64, seed=3), zipf_activations(300, 16, features=64, seed=3)
    assert one.shape == (5000, 16)
    assert one.dtype == torch.float32
    assert torch.equal(one[:300], two)
    assert not torch.equal(two, zipf_activations(300, 16, features=64, seed=4))
    assert one.isfinite().all()


def test_draws_follow_zipfs_law():
    draws = zipf_draws(200_000, 1000, 1.0, torch.Generator().manual_seed(0))
    assert draws.min() >= 0
    assert draws.max() < 1000
    counts = draws.bincount(minlength=1000).double()
    for first, second in [(0, 1), (1, 3), (4, 9)]:
        expected = (second + 1) / (first + 1)
        assert (counts[first] / counts[second]).item() == pytest.approx(expected, rel=0.1)


def test_few_features_with_little_noise_span_few_dimensions():
    x = zipf_activations(2000, 64, features=8, active=2, noise=0.0, outliers=0)
    values = torch.linalg.svdvals(x - x.mean(0))
    assert (values > 1e-3 * values[0]).sum() == 8


def test_outliers_stand_out_in_mean_and_variance():
    x = zipf_activations(3000, 64, features=256, outliers=3, outlier_scale=30.0)
    wide = x.std(0) > 10 * x.std(0).median()
    assert wide.sum() == 3
    shift = x.mean(0).abs()
    assert shift[wide].median() > 10 * shift[~wide].median()
    shared = zipf_activations(3000, 64, features=4096, active=1, mean_norm=5.0, outliers=0).mean(0)
    assert shared.norm().item() == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize("argument", ["tokens", "d", "features", "active"])
def test_bad_sizes_are_named(argument):
    sizes = {"tokens": 4, "d": 4, "features": 4, "active": 2, argument: 0}
    with pytest.raises(ValueError, match=f"{argument} must be at least 1"):
        zipf_activations(**sizes)
    with pytest.raises(ValueError, match="outliers must be in"):
        zipf_activations(4, 4, outliers=5)
