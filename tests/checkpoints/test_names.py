"""Names of one network in two checkpoints: prefixes, wrappers, spellings, layouts."""

import pytest

from mergetool.checkpoints.names import match, unwrapped

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def names(prefix="", *, num_layers=2, others=()):
    layers = {f"{prefix}layers.{i}.{name}": (4, 4) for i in range(num_layers) for name in LAYER}
    return layers | dict.fromkeys(others, (8, 4))


def test_equal_names_match_as_they_are():
    assert match(names("model."), names("model.")) == {name: name for name in names("model.")}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("model.", ""),
        ("", "model."),
        ("base_model.model.model.", "model."),
        ("language_model.model.", "model.language_model."),
        ("model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
        ("transformer.", "base_model.transformer."),
        ("transformer.", "model."),
    ],
)
def test_first_parts_are_learnt(here, there):
    found = match(names(here), names(there))
    assert found == {name: there + name.removeprefix(here) for name in names(here)}


def test_every_part_of_a_multimodal_model_finds_its_place():
    old = names(
        "language_model.model.", others=["language_model.lm_head.weight", "multi_modal_projector.linear.weight"]
    )
    old |= {"language_model.model.norm.weight": (4,), "vision_tower.layers.0.norm.weight": (4,)}
    new = names("model.language_model.", others=["lm_head.weight", "model.multi_modal_projector.linear.weight"])
    new |= {"model.language_model.norm.weight": (4,), "model.vision_tower.layers.0.norm.weight": (4,)}
    found = match(old, new)
    assert set(found.values()) == set(new)
    assert found["language_model.lm_head.weight"] == "lm_head.weight"
    assert found["language_model.model.norm.weight"] == "model.language_model.norm.weight"
    assert {new_name: old_name for old_name, new_name in found.items()} == match(new, old)


def test_a_text_model_meets_the_text_part_and_no_other():
    text = names("model.", others=["model.embed_tokens.weight"]) | {"model.norm.weight": (4,)}
    whole = names("model.language_model.", others=["model.language_model.embed_tokens.weight"])
    whole |= {"model.language_model.norm.weight": (4,)}
    whole |= {f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(2)}
    found = match(text, whole)
    assert all(other.startswith("model.language_model.") for other in found.values())
    assert len(set(found.values())) == len(text)


def test_what_two_parts_explain_equally_well_is_left_alone():
    both = names("text_model.") | names("vision_model.")
    assert match(names(""), both) == {name: name for name in names("")}
    by_shape = names("text_model.") | {f"vision_model.{name}": (6, 6) for name in names("")}
    assert match(names(""), by_shape) == {name: f"text_model.{name}" for name in names("")}


def test_one_tower_never_becomes_another():
    assert match(names("encoder."), names("decoder.")) == {name: name for name in names("encoder.")}
    head = {"pooler.dense.weight": (4, 4)}
    assert match({"classifier.dense.weight": (4, 4)}, head) == {"classifier.dense.weight": "classifier.dense.weight"}


def test_a_head_stays_at_the_top_and_its_neighbours_lose_their_first_part():
    mine = names("bert.", others=["classifier.weight", "bert.pooler.dense.weight"])
    found = match(mine, names(""))
    assert found["classifier.weight"] == "classifier.weight"
    assert found["bert.pooler.dense.weight"] == "pooler.dense.weight"
    other_way = match(names("", others=["score.weight"]), names("model."))
    assert other_way["score.weight"] == "score.weight"


def test_wrappers_and_old_spellings_are_seen_through():
    new = {
        "encoder.LayerNorm.weight": (4,),
        "encoder.LayerNorm.bias": (4,),
        "conv.parametrizations.weight.original0": (4,),
    }
    old = {"encoder._orig_mod.LayerNorm.gamma": (4,), "encoder._orig_mod.LayerNorm.beta": (4,), "conv.weight_g": (4,)}
    assert set(match(old, new).values()) == set(new)
    assert unwrapped(["_orig_mod.w", "a._orig_mod.b"]) == {"_orig_mod.w": "w", "a._orig_mod.b": "a.b"}
    assert unwrapped(["module.w", "module.module.v"]) == {"module.w": "w", "module.module.v": "module.v"}
    assert unwrapped(["module.w", "v"]) == {"module.w": "module.w", "v": "v"}
    assert unwrapped(["_orig_mod.w", "w"]) == {"_orig_mod.w": "_orig_mod.w", "w": "w"}


def test_a_spelling_that_would_make_two_names_one_is_not_used():
    both = {"ls.gamma": (4,), "ls.weight": (4,)}
    assert match(both, {"other.ls.gamma": (4,), "other.ls.weight": (4,)}) == {
        "ls.gamma": "other.ls.gamma",
        "ls.weight": "other.ls.weight",
    }


def test_vision_transformers_of_both_generations_meet():
    old = {
        "encoder.layer.0.attention.attention.query.weight": (4, 4),
        "encoder.layer.0.attention.output.dense.weight": (4, 4),
        "encoder.layer.0.intermediate.dense.weight": (8, 4),
        "encoder.layer.0.output.dense.weight": (4, 8),
    }
    new = {
        "vit.layers.0.attention.q_proj.weight": (4, 4),
        "vit.layers.0.attention.o_proj.weight": (4, 4),
        "vit.layers.0.mlp.fc1.weight": (8, 4),
        "vit.layers.0.mlp.fc2.weight": (4, 8),
    }
    assert list(match(old, new).values()) == list(new)


def test_no_two_names_become_one():
    mine = {"a.w": (4, 4), "model.a.w": (4, 4)}
    found = match(mine, {"model.a.w": (4, 4), "b": (4, 4)})
    assert len(set(found.values())) == 2
