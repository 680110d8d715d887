"""The results of the studies as pages."""

import pytest

from scripts.studies.catalogue.candidates import candidates
from scripts.studies.catalogue.table import render as catalogue_text
from scripts.studies.catalogue.table import share
from scripts.studies.mass.table import pictures as of_mass
from scripts.studies.mass.table import render as mass_text
from scripts.studies.merge3.estimators import CALIBRATION, KINDS
from scripts.studies.merge3.table import pictures as of_merge3
from scripts.studies.merge3.table import render as merge3_text
from scripts.studies.pages import write_page
from tests.pages.test_pages import Seen


def test_the_catalogue_tells_shares_of_the_experts_with_intervals():
    experts = {"a": "1110", "b": "1111"}
    best, worst = {"a": "1110", "b": "1111", "seconds": "0.5"}, {"a": "1001", "b": "1100", "seconds": "2"}
    assert share(best, experts) == (1.0, 0.0, 1.0)
    mean, half, least = share(worst, experts)
    assert (mean, least) == (pytest.approx((2 / 3 + 1 / 2) / 2), 0.5)
    of_a, of_b = (1 - 2 / 3, -2 / 3, -2 / 3, 1), (0.5, 0.5, -0.5, -0.5)  # what each answer is beyond its share
    squares = sum(x**2 for x in of_a) / 3 / 4 / 0.75**2 + sum(x**2 for x in of_b) / 3 / 4
    assert half == pytest.approx(1.96 * squares**0.5 / 2)
    lines = catalogue_text({"set": {"experts": experts, "ties": worst, "iso-c": best}}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| iso-c", "| ties"]


def test_the_catalogue_has_every_method_for_many_fine_tunes_and_no_data():
    names = {name for name, _ in candidates()}
    assert {"ties", "tsv-merge", "pcb", "iso-cts", "karcher"} <= names
    assert not {"slerp", "fisher", "mass", "merge3", "c2m3", "moe", "swag", "factor-sum"} & names


def test_merging_and_routing(tmp_path):
    tasks = {"digits": 0.5, "language": 0.7}
    routed = {task: {"strict": 0.4, "class": 0.5, "nearest": 0.9, "chosen": 0.9, "tasks": 1.5} for task in tasks}
    routing = {f"encoder.layer.{layer}.{kind}.weight": 0.5 for layer in range(3) for kind in ("query", "key")}
    results = {
        "known task": {"experts": tasks, "ties": {"digits": 0.25, "language": 0.7}},
        "routed": {"mass": routed},
        "routing": {"base": routing | {"all, l2": 0.8}},
    }
    path = tmp_path / "results.html"
    write_page(path, "Merging and routing", mass_text(results), of_mass(results))
    seen = Seen(path.read_text("utf-8"))
    for told in ("Accuracy", "ties (task known)", "0.250", "query", "share of samples whose task is nearest"):
        assert told in seen.pieces


@pytest.fixture
def searched():
    winner = {"estimate": [0.9, 0.8], "search_mean": 0.84, "report": [0.8, 0.9], "report_mean": 0.85}
    compared = [
        {"name": name, "report": [0.5, 0.6], "report_mean": 0.55} for name in ("base", "a", "start of the search")
    ]
    facts = {
        "tasks": [{"name": "one"}, {"name": "two"}],
        "winner": winner,
        "compared": compared,
        "front": [],
        "seconds": {"merge": 1.0, "evaluate": 2.0},
        "spent": {"searching": 1000, "reduction": 3.0},
    }
    row = {"name": "full", "seed": 0, "report": [0.8, 0.1], "items": 1000, "reduction": 3.0}
    row |= {key: [0.1, 0.01] for key in ("best_parent", "uniform", "full")}
    sizes = [{"calibration": CALIBRATION, "items": count} | {key: [0.1, 0.9] for key in KINDS} for count in (10, 50)]
    return {"main": [row], "searches": {"full": facts, "few": facts}, "estimators": sizes}


def test_searches(tmp_path, searched):
    path = tmp_path / "results.html"
    write_page(path, "Evolving merges", merge3_text(searched), of_merge3(searched))
    seen = Seen(path.read_text("utf-8"))
    for told in ("Score and cost", "Estimators", "best parent", "0.800 ± 0.100", "rank correlation"):
        assert told in seen.pieces
    write_page(path, "Evolving merges", merge3_text(searched), of_merge3(searched | {"estimators": []}))
