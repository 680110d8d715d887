"""Pages in a real browser."""

import pytest

from mergetool.analysis.page import analysis_page
from mergetool.pages import Chapter, Page, Picture, lines, render
from mergetool.pages.colours import NAMED
from mergetool.pages.words import visible
from scripts.studies.pages import write_page
from tests.pages.browsing import NARROW, opened, standing, stands
from tests.pages.planted import Planted
from tests.pages.samples import HOSTILE, ROWS, rendered
from tests.pages.test_pages import Seen


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "page.html"
    path.write_text(rendered(), "utf-8")
    return path


@pytest.fixture(scope="module")
def shown(browser, path):
    """The page, open for several tests: each leaves it as long as it was."""
    with opened(browser, path) as page:
        yield page


def test_a_page_with_one_of_everything_and_hostile_names_stands(browser, path):
    stands(browser, path)


NORMS = sorted(norm for _, _, norm, _, _ in ROWS if norm is not None)


def cells(page, column, table=0):
    rows = page.locator("figure.table").nth(table).locator("tbody tr:visible")
    return rows.locator(f"td:nth-child({column + 1})").all_inner_texts()


def test_a_table_is_sorted_by_a_click_and_what_has_no_value_comes_last(shown):
    head = shown.get_by_role("button", name="norm")
    head.click()
    assert [float(text) for text in cells(shown, 2)] == pytest.approx(NORMS[:-11:-1], rel=5e-3)
    assert shown.locator("th[aria-sort=descending]").inner_text() == "norm"
    head.click()
    assert [float(text) for text in cells(shown, 2)] == pytest.approx(NORMS[:10], rel=5e-3)
    shown.get_by_role("button", name="show all 60 rows").click()
    assert len(cells(shown, 2)) == 60
    assert cells(shown, 2)[-1] == "–"
    head.click()
    assert cells(shown, 2)[-1] == "–"
    shown.get_by_role("button", name="show the first 10 only").click()
    assert len(cells(shown, 2)) == 10


def test_names_with_numbers_are_sorted_by_the_numbers(shown):
    shown.get_by_role("button", name="show all 60 rows").click()
    head = shown.get_by_role("button", name="tensor", exact=True)
    head.click()
    found = cells(shown, 0)
    assert found[:5] == ["layers.0.k", "layers.0.o", "layers.0.q", "layers.0.v", "layers.1.k"]
    assert found[-1] == "layers.14.v"
    head.click()
    assert cells(shown, 0)[0] == "layers.14.v"
    shown.get_by_role("button", name="show the first 10 only").click()


def test_without_scripts_everything_is_there(browser, path):
    with opened(browser, path, java_script_enabled=False) as page:
        assert page.locator("figure.table").first.locator("tbody tr:visible").count() == 60
        assert page.locator("th button").count() == 0


def test_every_entry_of_the_contents_leads_to_its_chapter(shown):
    links = shown.locator("nav a").all()
    assert len(links) == 5
    for link in links:
        name = link.get_attribute("href").removeprefix("#")
        target = shown.locator(f'[id="{name}"]')
        assert target.count() == 1
        assert target.locator("h2").inner_text() == link.inner_text()


def test_no_two_things_have_one_name(shown):
    twice = "() => { const all = [...document.querySelectorAll('[id]')].map(x => x.id);"
    assert shown.evaluate(twice + "return all.filter((x, place) => all.indexOf(x) !== place); }") == []


COLOURS = """() => {
  const line = [...document.querySelectorAll("svg path")].find(x => x.style.stroke.includes("--s0"));
  const [text, body] = ["svg text", "body"].map(what => getComputedStyle(document.querySelector(what)));
  return [text.fill, getComputedStyle(line).stroke, body.color];
}"""


def test_plots_follow_the_mode(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render(Page("plot", "", [Chapter("one", [Picture(lines({"a": ([1, 2], [1, 2])}, "x", "y"))])])))
    seen = {}
    for mode in ("light", "dark"):
        with opened(browser, path, mode) as page:
            seen[mode] = page.evaluate(COLOURS)
    for mode, colours in seen.items():
        assert colours == [css(NAMED[mode][name]) for name in ("ink", "s0", "ink")]
    assert seen["light"] != seen["dark"]


def css(colour):
    return f"rgb({', '.join(str(value) for value in bytes.fromhex(colour[1:]))})"


def test_on_paper_a_page_is_light_whatever_the_mode(browser, path):
    with opened(browser, path, "dark", NARROW) as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == css(NAMED["light"]["paper"])
        assert page.locator("nav").is_hidden()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_three_hundred_tensors_of_models_with_the_worst_of_names_are_less_than_two_megabytes_and_stand(
    browser, tmp_path
):
    path = tmp_path / "page.html"
    path.write_text(analysis_page(Planted(HOSTILE, layers=33).facts()), "utf-8")
    assert path.stat().st_size < 2_000_000
    with standing(browser, path) as page:
        page.get_by_role("button", name="show all 299 rows").click()
        tensors = page.locator("section", has=page.get_by_role("heading", name="Tensors", exact=True))
        changes = [float(text.split()[0]) for text in tensors.locator("tbody td:nth-child(4)").all_inner_texts()]
        assert changes == sorted(changes, reverse=True)
        tensors.get_by_role("button", name=HOSTILE[6]).click()
        changes = [float(text.split()[0]) for text in tensors.locator("tbody td:nth-child(11)").all_inner_texts()]
        assert changes == sorted(changes, reverse=True)
    seen = Seen(path.read_text("utf-8"))
    assert [tag for tag, _ in seen.elements].count("script") == 1
    for name in HOSTILE:
        assert visible(name) in seen.text


TEXT = """# A study

What was tried.
On two lines.

## Scores

| method | score | of all |
|---|---|---|
| plain | 0.5 ± 0.1 | |
| **best** | 0.75 | 1,200 |

Time: 0.5.
"""


def test_markdown_becomes_chapters_with_tables_that_sort_by_their_numbers(browser, tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "Title", TEXT, {"Curves": [Picture(lines({"a": ([1, 2], [1, 2])}, "x", "y"), "one")]})
    with opened(browser, path) as page:
        assert page.locator("h1").inner_text() == "Title"
        assert page.locator("p.lead").first.inner_text() == "What was tried. On two lines."
        assert page.locator("h2").all_inner_texts() == ["Curves", "Scores"]
        page.get_by_role("button", name="score").click()
        assert page.locator("tbody td:first-child").all_inner_texts() == ["best", "plain"]
        assert page.locator("tr.strong td").all_inner_texts() == ["best", "0.75", "1,200"]
        assert page.locator("section").nth(1).locator("p").inner_text() == "Time: 0.5."
