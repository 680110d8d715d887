"""The page of a real analysis."""

import mergetool
from mergetool.analysis.page import analysis_page
from tests.analysis.models import ancestor, changed
from tests.analysis.models import state as weights_of
from tests.pages.browsing import standing, stands


def test_a_real_analysis_stands_and_names_the_stranger_first(browser, recipe, tmp_path):
    ancestor(tmp_path / "stranger", seed=7)
    found = mergetool.analyze(recipe(stranger=tmp_path / "stranger"))
    path = tmp_path / "page.html"
    path.write_text(analysis_page(found.facts), "utf-8")
    with standing(browser, path) as page:
        first = page.locator("article.finding").first
        assert "stranger" in first.locator("h3").inner_text()
        assert first.locator(".tag").inner_text() == "problem"
        assert page.locator("figure.picture svg").count() == 14
        models = page.locator("section", has=page.get_by_role("heading", name="The models", exact=True)).locator(
            "tbody tr"
        )
        assert [row.split("\t")[0].strip() for row in models.all_inner_texts()] == list(found.facts["models"])


def test_a_page_of_models_that_leave_layers_as_they_are(browser, recipe, family, tmp_path):
    """Frozen layers have no directions."""
    state = {name: tensor.float() for name, tensor in weights_of(family / "code").items() if ".layers.0." not in name}
    changed(family / "base", tmp_path / "frozen", state.get)
    path = mergetool.analyze(recipe(("code",), frozen=tmp_path / "frozen")).write(tmp_path / "page")
    stands(browser, path)
