"""Merges made today are those made when golden.json was written (how to write it again: make.py)."""

import json

import pytest
import torch

from mergetool.testing.cases import each_once
from tests.files import LONG
from tests.golden.make import GOLDEN, every_case, is_exact, name_of, outcome

EVERY = every_case()
CASES = {name_of(case): case for case in (EVERY if LONG else each_once(EVERY, turn=1))}
"""In the suite every method by its defaults, and an option of a family with one of its methods."""
KEPT = json.loads(GOLDEN.read_text())
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def test_every_method_has_a_golden_merge_and_no_other_has():
    assert sorted(map(name_of, EVERY)) == sorted(KEPT), "run python tests/golden/make.py and commit golden.json"


@pytest.mark.skipif(not FUSED, reason="digests are those of processors with fused multiply-add")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if is_exact(case)])
def test_the_file_is_the_same_to_the_bit(name, tmp_path):
    assert outcome(CASES[name], tmp_path) == KEPT[name]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not is_exact(case)])
def test_the_numbers_are_the_same(name, tmp_path):
    found = outcome(CASES[name], tmp_path)
    assert found.keys() == KEPT[name].keys()
    for tensor, values in found.items():
        assert values == pytest.approx(KEPT[name][tensor], rel=0, abs=2e-6), tensor
