"""What README and docs/ say can be followed: links lead somewhere, recipes are valid, the first page is short."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import mergetool

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """The text without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def recipes():
    """Every block of YAML that is a whole recipe of ours, with the page that it is on."""
    for page in (page for page in PAGES if page.name != "CONTRIBUTING.md"):  # which test_contributing follows
        for number, text in enumerate(BLOCK.findall(page.read_text("utf-8"))):
            if re.search(r"^models:", text, re.MULTILINE) and re.search(r"^merge:", text, re.MULTILINE):
                yield pytest.param(text, id=f"{page.relative_to(ROOT)} {number}")


@every_page
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:", "..//")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_of_the_documentation_is_in_its_index():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]


def test_the_first_page_is_short():
    assert 600 <= len((ROOT / "README.md").read_text("utf-8").split()) <= 900


@pytest.mark.parametrize("text", list(recipes()))
def test_every_recipe_in_the_documentation_is_valid(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    (tmp_path / "runs" / "checkpoint-1").mkdir(parents=True)  # that globs find something
    mergetool.load_recipe(tmp_path / "recipe.yaml")


def test_no_page_names_a_path_of_somebodys_machine():
    homes = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users)/")
    assert [str(page) for page in PAGES if homes.search(page.read_text("utf-8"))] == []


def test_what_is_committed_is_formatted_by_the_same_ruff_as_by_the_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["dev"]
    (pinned,) = [wanted for wanted in dev if wanted.startswith("ruff==")]
    assert [hook["additional_dependencies"] for hook in hooks] == [[pinned]] * len(hooks)


def test_the_workflow_tries_every_python_and_the_torch_that_are_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert matrix["python"] == named
    lowest = next(line for line in project["dependencies"] if line.startswith("torch")).partition(">=")[2]
    assert any(each["torch"].startswith(lowest) for each in matrix["include"])
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(path.read_text("utf-8"))


def test_a_gradient_is_what_the_page_about_recipes_says():
    """Nine layers, three values: layer 4 has the second; what is outside the layers has the first, or an override's."""
    names = [f"model.layers.{layer}.mlp.weight" for layer in range(9)]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    ones = dict.fromkeys(names, torch.ones(1))
    section = {
        "method": "passthrough",
        "scale": {"gradient": [1.0, 2.0, 4.0]},
        "overrides": [{"match": "lm_head.*", "scale": 5.0}],
    }
    merged = {name: float(value) for name, value in mergetool.merge_state_dicts(section, {"a": ones}).items()}
    assert [merged[name] for name in names] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 1.0, 1.0, 5.0]


def test_a_section_that_the_page_about_recipes_leaves_out_is_told(tmp_path, forks):
    for name in ("docs", "recipes", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / "docs" / "recipe.md"
    written = page.read_text("utf-8")

    def check():
        return forks.python("scripts/docs", "--check", cwd=tmp_path).wait()[0].err

    page.write_text(written.replace("<!-- end of compute -->", ""), "utf-8")
    assert "docs/recipe.md says nothing of compute" in check()
    page.write_text(written.replace("seed of every random draw", "a number"), "utf-8")
    assert check() == "out of date: docs/recipe.md\n  fix: scripts/docs --write\n"  # and nothing else is


def test_the_picture_of_the_house_has_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = {path.parent.name for path in (ROOT / "mergetool").glob("*/__init__.py")}
    assert {room for room in rooms if f"{room}/ " not in text} == set()
    named = set(re.findall(r"`(\w+(?:/\w+)*\.py)`", text))
    everywhere = {str(path.relative_to(ROOT / "mergetool")) for path in (ROOT / "mergetool").rglob("*.py")}
    assert {name for name in named if not any(f"/{each}".endswith(f"/{name}") for each in everywhere)} == set()
