"""Pages as text: strangers' names stay text, colours can be told apart, sizes stay small."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mergetool.pages import Chapter, Page, Picture, Table, bars, heat, lines, points, render
from mergetool.pages.cells import shown
from mergetool.pages.colours import LEVELS, NAMED, SERIES
from mergetool.pages.words import label, visible
from tests.pages.samples import HOSTILE, pictures, rendered


@pytest.fixture(scope="module")
def html():
    return rendered()


class Seen(HTMLParser):
    """The elements of a page, and the text in it."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.pieces = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        self.pieces += [data.strip()] if data.strip() else []


def test_names_of_strangers_stay_text(html):
    seen = Seen(html)
    assert [tag for tag, _ in seen.elements if tag in ("img", "iframe", "object", "embed")] == []
    assert [tag for tag, _ in seen.elements].count("script") == 1
    assert [name for _, attrs in seen.elements for name in attrs if name.startswith("on")] == []
    for name in HOSTILE:
        assert visible(name) in seen.text


def test_only_the_script_of_the_page_may_run_and_nothing_may_be_fetched(html):
    (policy,) = [attrs["content"] for tag, attrs in Seen(html).elements if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none';")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)
    links = [attrs[key] for _, attrs in Seen(html).elements for key in ("src", "href", "xlink:href") if key in attrs]
    assert [link for link in links if not link.startswith(("#", "data:"))] == []


def test_the_colours_of_a_name_are_not_taken_for_colours(html):
    assert "#d55e00 var(--s1)" in Seen(html).text


def test_every_colour_of_a_picture_follows_the_mode(html):
    styles = [attrs.get("style", "") for _, attrs in Seen(html[html.index("<svg") :]).elements]
    assert any("var(--s0)" in style for style in styles)
    assert [style for style in styles if re.search(r"#[0-9a-fA-F]{3,8}\b", style) and "url(#" not in style] == []


def test_the_same_data_give_the_same_page():
    one, other = (render(Page("a", "", [Chapter("b", pictures()[1:4])])) for _ in range(2))
    assert one == other


def test_importing_pages_imports_nothing_heavy():
    code = (
        "import mergetool.pages, sys; sys.exit(bool({'matplotlib', 'jinja2', 'numpy', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_without_the_extra_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="jinja2"):
        render(Page("a"))


def test_the_example_of_the_documentation_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "pages.md").read_text("utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    written = (tmp_path / "scores.html").read_text("utf-8")
    assert Seen(written).pieces[0] == "Two ways to merge"
    assert written.count("<svg") == 1


def test_a_row_that_does_not_fit_its_columns_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        render(Page("a", "", [Chapter("b", [Table(["one", "two"], [("x",)])])]))


def test_an_empty_table_and_a_picture_of_nothing_are_fine():
    draws = [lines({"a": ([], [])}, "x", "y", log=True), bars({}, [], "x"), heat([], [], [], "x"), points({}, "x", "y")]
    page = render(Page("a", "", [Chapter("b", [Table(["one"], []), *map(Picture, draws)])]))
    assert page.count("<svg") == 4


def test_next_to_nothing_does_not_look_like_much():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    lines({"a": ([1, 2], [0.001, -0.001])}, "layer", "cosine", least=(-0.2, 0.2))(axes)
    assert axes.get_ylim() == (-0.2, 0.2)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (None, "number", "–"),
        (0.012345, "number", "0.0123"),
        (12345.6, "number", "12,346"),
        (1.5e-9, "number", "1.5e-09"),
        (0.999779, "number", "0.99978"),
        (0.99999948, "number", "0.99999948"),
        (1 - 1e-12, "number", "1"),
        (1.0, "number", "1"),
        (float("nan"), "number", "nan"),
        (0.5, "share", "50 %"),
        (0.99999, "share", "> 99.9 %"),
        (1.0, "share", "100 %"),
        (0.00012, "share", "0.012 %"),
        (1e-9, "share", "< 0.0001 %"),
        (12, "share", "1,200 %"),
        (12345, "count", "12,345"),
        (2_500_000, "bytes", "2.5 MB"),
        (0.25, "signed", "+0.250"),
        (-1e-9, "signed", "0.000"),
        (3.2, "seconds", "3.2 s"),
        (True, "text", "yes"),
        ("name", "number", "name"),
    ],
)
def test_values_are_shown_as_people_read_them(value, kind, expected):
    assert shown(value, kind) == expected


def test_a_long_name_keeps_its_beginning_and_its_end_on_an_axis():
    assert label("organisation/" + "x" * 40 + "-v2.1") == "organisation/…xxxxxxxxx-v2.1"
    assert label("short") == "short"


# What people see who lack one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    values = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    lms = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]) @ rgb
    turn = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(turn) @ np.cbrt(np.clip(lms, 0, None))


def contrast(one, other):
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_lines_can_be_told_apart_by_everybody(mode, sight):
    seen = [oklab(np.array(SIGHT[sight]) @ linear(colour)) for colour in SERIES[mode]]
    apart = [np.linalg.norm(a - b) for place, a in enumerate(seen) for b in seen[:place]]
    assert min(apart) > (0.1 if sight == "all" else 0.075)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_can_be_read_on_their_ground(mode):
    named = NAMED[mode]
    for text in ("ink", "muted", "link", "good", "warn", "bad"):
        for ground in ("paper", "panel"):
            assert contrast(named[text], named[ground]) > 4.5, (text, ground)
    assert min(contrast(colour, named["paper"]) for colour in SERIES[mode]) > 2.5


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_numbers_in_the_cells_of_a_map_can_be_read(mode):
    """As `heat` writes them: ink on what is near the paper, paper on what is far from it."""
    named = NAMED[mode]
    for place in range(LEVELS):
        far = {"q": place > LEVELS // 2, "d": abs(place - LEVELS // 2) > LEVELS // 4}
        for kind, text in far.items():
            assert contrast(named[f"{kind}{place}"], named["paper" if text else "ink"]) > 3.5, (kind, place)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_map_of_colours_goes_steadily_from_the_paper_away(mode):
    named = NAMED[mode]
    far = [contrast(named[f"q{place}"], named["paper"]) for place in range(LEVELS)]
    assert far == sorted(far)
    for half in (range(LEVELS // 2, LEVELS), range(LEVELS // 2, -1, -1)):
        far = [contrast(named[f"d{place}"], named["paper"]) for place in half]
        assert far == sorted(far)
