"""Results on the Hub: one commit, nothing twice, nothing that was not asked for, and no secret anywhere."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.files import content, tensors, write_model, write_recipe
from tests.hub.conftest import HASTY, SHAPES, model_folder
from tests.hub.server import TOKEN

CI = Path(__file__).parents[2] / "recipes" / "ci"


@pytest.fixture
def result(call, recipe, tmp_path):
    """A finished merge of org/a and org/b."""
    assert call("run", recipe).code == 0
    return tmp_path / "out"


def test_a_push_makes_one_commit_of_the_lock_and_what_it_names(hub, call, result):
    (result / "notes.txt").write_text("mine")
    missing = call("push", result, "me/merged", "--json", token=TOKEN)
    assert (missing.code, "--create" in missing.answer["fix"]) == (8, True)
    done = call("push", result, "me/merged", "--create", "--json", token=TOKEN)
    assert done.code == 0, done.err
    lock = json.loads((result / "mergetool.json").read_text())
    names = {*lock["output"]["files"], "mergetool.json"}
    assert set(done.answer["uploaded"]) == names
    assert set(hub.files("me/merged")) == names | {".gitattributes"}
    assert all(hub.read("me/merged", name) == (result / name).read_bytes() for name in names)
    assert len(hub.log("me/merged")) == 2
    assert "Merge by linear" in hub.log("me/merged")[0]
    assert done.answer["commit"] == hub.refs("me/merged")["main"]


def test_a_second_push_uploads_nothing_and_makes_no_commit(hub, call, result):
    assert call("push", result, "me/merged", "--create", token=TOKEN).code == 0
    before, asked = hub.refs("me/merged"), len(hub.requests)
    again = call("push", result, "me/merged", "--json", token=TOKEN)
    assert (again.code, again.answer["uploaded"]) == (0, [])
    assert again.answer["commit"] == before["main"]
    assert hub.refs("me/merged") == before
    assert {method for method, _, _ in hub.requests[asked:]} == {"GET"}


def test_a_changed_merge_sends_what_changed_and_takes_stale_shards_away(hub, call, recipe, tmp_path):
    small = ("--set", "output.shard_size=7000")
    assert call("run", recipe, *small, "-o", "one").code == 0
    assert call("push", "one", "me/merged", "--create", token=TOKEN).code == 0
    assert any(name.startswith("model-0000") for name in hub.files("me/merged"))
    assert call("run", recipe, "-o", "two").code == 0
    done = call("push", "two", "me/merged", "--json", token=TOKEN)
    assert done.code == 0, done.err
    assert set(done.answer["uploaded"]) == {"model.safetensors", "README.md", "mergetool.json"}
    assert "model.safetensors.index.json" in done.answer["deleted"]
    assert set(hub.files("me/merged")) == {path.name for path in (tmp_path / "two").iterdir()} | {".gitattributes"}


def test_a_file_changed_after_the_merge_is_not_pushed(hub, call, result):
    weights = result / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = call("push", result, "me/merged", "--create", "--json", token=TOKEN)
    assert (done.code, "not what the lock says" in done.answer["what"]) == (3, True)
    assert call("push", result.parent / "made" / "a", "me/merged", token=TOKEN).code == 3
    assert not hub.folder("me/merged").exists()


def test_private_repositories_and_pull_requests(hub, call, result):
    assert call("push", result, "me/secret", "--private", token=TOKEN).code == 0
    assert "me/secret" in hub.private
    public = call("push", result, "org/a", "--private", "--json", token=TOKEN)
    assert (public.code, "is public" in public.answer["what"]) == (8, True)
    main = hub.refs("org/a")["main"]
    for _ in range(2):  # the second finds the first
        done = call("push", result, "org/a", "--pull-request", "--json", token=TOKEN)
        assert (done.code, done.answer["url"]) == (0, f"{hub.url}/org/a/discussions/1"), done.err
    assert (hub.refs("org/a")["main"], len(hub.pulls["org/a"])) == (main, 1)


def test_a_recipe_pushes_what_it_merged_and_says_beforehand_if_it_cannot(hub, call, recipe, tmp_path):
    document = yaml.safe_load(recipe.read_text())
    document["output"]["hub"] = {"repo": "me/merged", "private": True}
    write_recipe(recipe, **document)
    for token, words in ((None, "log in"), ("hf_wrong", "does not accept")):
        done = call("run", recipe, "--json", token=token)
        assert (done.code, words in f"{done.answer['what']} {done.answer['fix']}") == (8, True)
        assert not (tmp_path / "out").exists()
    assert call("run", recipe, "--no-push", "-o", "kept").code == 0
    done = call("run", recipe, "--json", token=TOKEN)
    assert (done.code, done.answer["pushed"]["repo"]) == (0, "me/merged"), done.err
    assert content(tmp_path / "out") == content(tmp_path / "kept")
    del document["output"]["hub"]
    assert call("run", write_recipe(recipe, **document), "--push").code == 8


@pytest.mark.parametrize(
    ("method", "pattern", "answer", "code"),
    [
        ("POST", "/commit/", 500, 8),
        ("POST", "/commit/", 403, 8),
        ("POST", "/commit/", ("stall", 10), 8),
        ("POST", "/commit/", ("cut", 10), 0),  # the commit was made, and only its answer is lost
        ("PUT", "cdn/upload", ("cut", 0), 0),
        ("POST", "/preupload/", 503, 0),
    ],
)
def test_a_push_that_fails_leaves_the_result_and_no_commit(hub, call, result, method, pattern, answer, code):
    hub.create("me/merged")
    before = hub.refs("me/merged")
    with hub.trouble(method, pattern, answer, times=1):
        done = call("push", result, "me/merged", "--json", token=TOKEN, **HASTY)
    assert done.code == code, done.err
    if code:
        assert done.answer["error"] == "HubError"
        assert hub.refs("me/merged") == before
    again = call("push", result, "me/merged", "--json", token=TOKEN)
    assert (again.code, bool(again.answer["uploaded"])) == (0, bool(code))
    assert len(hub.log("me/merged")) == 2


def test_the_card_says_what_the_hub_reads_and_the_recipe_in_it_makes_the_model_again(hub, call, recipe, tmp_path):
    document = yaml.safe_load(recipe.read_text()) | {"base": "org/base", "merge": {"method": "task-arithmetic"}}
    model_folder(tmp_path / "local", 6, "mit")
    document["models"]["c"] = "./local"
    assert call("run", write_recipe(recipe, **document)).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/base", "org/a", "org/b"]
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "mergetool"]
    assert (front["license"], front["license_name"]) == ("other", "several")
    assert "| c | `./local` | mit |" in card
    again = card.split("```yaml\n")[1].split("```")[0]
    assert f"org/a@{hub.refs('org/a')['main']}" in again
    (tmp_path / "again.yaml").write_text(again)
    assert call("run", "again.yaml", "-o", "again").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_one_licence_of_all_is_the_licence_and_an_unknown_one_is_none(hub, call, recipe, tmp_path):
    assert call("run", recipe).code == 0
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    write_model(tmp_path / "bare", tensors(3, SHAPES))
    assert call("run", recipe, "--set", "models.b=./bare", "-o", "two").code == 0
    card = (tmp_path / "two" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "find out before you pass" in card


def test_no_token_is_written_anywhere(hub, call, recipe, tmp_path):
    assert call("run", recipe, token=TOKEN).code == 0
    assert call("push", "out", "me/merged", "--create", token=TOKEN).code == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [str(path) for path in written if TOKEN.encode() in path.read_bytes()] == []


def test_the_sample_workflow_runs_as_it_is(hub, call, tmp_path):
    workflow = yaml.safe_load((CI / "merge.yml").read_text())
    steps = {step["name"]: step["run"] for step in workflow["jobs"]["merge"]["steps"] if "name" in step}
    shutil.copy(CI / "recipe.yaml", tmp_path)
    assert call("run", "recipe.yaml", "--no-push", "-o", "by-hand").code == 0
    shutil.copy(tmp_path / "by-hand" / "mergetool.json", tmp_path)
    for name in ("check", "merge and push", "verify"):
        command, _, _ = steps[name].partition(" > ")
        done = call(*command.split()[1:], token=TOKEN)
        assert done.code == 0, done.err
    assert hub.read("me/merged", "model.safetensors") == (tmp_path / "out/merged/model.safetensors").read_bytes()
    hub.upload("org/a", model_folder(tmp_path / "new", 8))
    moved = call(*steps["merge and push"].partition(" > ")[0].split()[1:], "--overwrite", token=TOKEN)
    assert (moved.code, "commits differ" in moved.answer["what"]) == (3, True)
    assert len(hub.log("me/merged")) == 2
