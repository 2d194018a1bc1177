"""The study of toys writes what it promises."""

import json
import re

import pytest

from sparsekern.analysis.studies.options import ToyOptions
from sparsekern.analysis.studies.toy import study


def test_a_quick_study_writes_a_page_pictures_and_numbers(tmp_path):
    written = study(ToyOptions(quick=True), tmp_path / "out", progress=False)
    page = written[0].read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written} == {"page.md", "results.json", *shown}
    assert set(shown) == {"law.png", "manifold.png", "bigrams.png", "bigrams_kl.png"}
    assert "{" not in page
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert set(record["absorption"]) == {"plain", "tied weights", "matryoshka"}
    assert len(record["law"]["dictionaries"]["cells"]) == 20
    assert {entry["against"] for entry in record["wrong_l0"]["k=1.8, +0.4"][0]["f0_in_others"]} == {
        "another in the place of f0",
        "random dictionary",
    }
