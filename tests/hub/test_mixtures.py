"""A mixture of models that are not here yet: planned from headers and configs, measured once the base has come."""

from tests.dense import write_dense
from tests.files import content, write_recipe

EXPERTS = {"base": {"prompts": ["w1 w2"]}, "a": {"prompts": ["w3"]}}


def test_a_mixture_is_planned_from_headers_and_run_after_fetching(hub, call, tmp_path):
    for seed, name in enumerate(("dense", "expert")):
        hub.upload(f"org/{name}", write_dense(tmp_path / "made" / name, seed=seed))
    merge = {"method": "moe", "experts": EXPERTS}
    asked = {"base": "org/dense", "models": {"a": "org/expert"}, "merge": merge, "output": {"path": "out"}}
    recipe = write_recipe(tmp_path / "moe.yaml", **asked)
    planned = call("plan", recipe, "--json")
    assert planned.code == 0, planned.err
    told = {step["name"]: step["method"] for step in planned.answer["steps"]}
    assert told["model.layers.2.block_sparse_moe.experts.1.w2.weight"] == "expert"
    assert len(hub.asked("^cdn/files")) == 2  # the beginning of each
    assert hub.asked("tokenizer") == []
    done = call("run", recipe)
    assert done.code == 0, done.err
    here = {"base": "made/dense", "models": {"a": "made/expert"}, "output": {"path": "local"}}
    assert call("run", write_recipe(tmp_path / "local.yaml", **asked | here)).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "local")
