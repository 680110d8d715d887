"""Models on the Hub, compared: with each other, and with what a recipe makes of them."""

import json

from tests.files import write_recipe


def test_models_on_the_hub_differ_as_local_ones_do(hub, call, tmp_path):
    done = call("diff", "org/a", "org/b", "--json")
    assert done.code == 0, done.err
    assert "fetching org/a" in done.err
    local = call("diff", "made/a", "made/b", "--json").answer
    assert done.answer["tensors"] == local["tensors"]
    assert call("diff", "org/a", "made/a", "--exit-code").code == 0


def test_a_checkpoint_is_held_against_a_recipe_of_models_on_the_hub(hub, call, recipe, tmp_path):
    models = {"a": "made/a", "b": "made/b"}
    local = write_recipe(tmp_path / "local.yaml", models=models, merge={"method": "linear"}, output={"path": "local"})
    assert call("run", local).code == 0
    done = call("verify", "local", "--against", recipe, "--json")
    assert done.code == 0, done.err
    assert (done.answer["answer"], "fetching org/a" in done.err) == ("yes", True)


def test_a_model_that_is_not_on_the_hub_cannot_be_told(hub, call, recipe):
    done = call("verify", "made/a", "--against", recipe, "--set", "models.b=org/nothing", "--json")
    assert (done.code, done.answer["answer"]) == (5, "cannot tell")
    assert "org/nothing" in json.dumps(done.answer)
