"""Files of mergekit-moe: every setting finds its place, slips are told, what cannot be is refused where it stands."""

import pytest
import yaml

import mergetool
from mergetool.errors import RecipeError
from mergetool.recipe.load import imported_text

EXPERTS = [
    {"source_model": "org/math", "positive_prompts": ["solve"], "negative_prompts": ["def"]},
    {"source_model": "org/code", "positive_prompts": ["def"]},
]


@pytest.fixture
def convert(tmp_path):
    """The `merge` section that a file becomes, and the whole recipe as it was loaded."""

    def made(**sections):
        data = {"base_model": "org/base", "experts": EXPERTS, **sections}
        path = tmp_path / "moe.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
        text, _ = imported_text(path, tmp_path)
        (tmp_path / "ours.yaml").write_text(text)
        mergetool.load_recipe(tmp_path / "ours.yaml")
        return mergetool.load_recipe(path)

    return made


def merge(recipe):
    return recipe.document["merge"]


def test_a_plain_file_becomes_a_mixture_of_its_models(convert):
    recipe = convert(dtype="bfloat16", experts_per_token=1)
    assert recipe.document["base"] == "org/base"
    assert recipe.document["models"] == {"math": "org/math", "code": "org/code"}
    assert recipe.document["output"] == {"dtype": "bfloat16"}
    assert merge(recipe) == {
        "method": "moe",
        "target": "auto",
        "gate": "hidden",
        "experts": {"math": {"prompts": ["solve"], "avoid": ["def"]}, "code": {"prompts": ["def"]}},
        "experts_per_token": 1,
    }


@pytest.mark.parametrize(
    ("mode", "gate"),
    [
        ("hidden", "hidden"),
        ("hidden_last", "hidden"),
        ("hidden_avg", "hidden-avg"),
        ("cheap_embed", "embedding"),
        ("random", "random"),
        ("uniform_random", "uniform-random"),
    ],
)
def test_every_gate_mode_has_a_counterpart(convert, mode, gate):
    recipe = convert(gate_mode=mode)
    assert merge(recipe)["gate"] == gate
    told = "random gates read no prompt" in " ".join(recipe.warnings)
    assert told == gate.endswith("random") == all(not each for each in merge(recipe)["experts"].values())


def test_the_base_and_a_model_taken_twice_are_experts_of_names_of_their_own(convert):
    again = {"source_model": "org/code", "positive_prompts": ["class"]}
    base = {"source_model": "org/base", "positive_prompts": ["hello"]}
    recipe = convert(experts=[*EXPERTS, base, again])
    assert list(recipe.models) == ["math", "code"]
    assert list(merge(recipe)["experts"]) == ["math", "code", "base", "code-2"]
    assert merge(recipe)["experts"]["code-2"] == {"model": "code", "prompts": ["class"]}


def test_a_base_that_is_its_own_only_expert_is_copied_for_training(convert):
    copies = [{"source_model": "org/base", "noise_scale": 0.01}] * 3
    recipe = convert(experts=copies, gate_mode="random")
    assert recipe.document["base"] == "org/base"
    assert recipe.document["models"] == {"base-model": "org/base"}
    assert list(merge(recipe)["experts"]) == ["base-model", "base-model-2", "base-model-3"]
    assert "until it is trained, the mixture computes what the base does" in " ".join(recipe.warnings)


def test_what_is_done_to_one_expert_becomes_an_override(convert):
    changed = [EXPERTS[0], {**EXPERTS[1], "noise_scale": 0.1, "residual_scale": "0.5"}]
    recipe = convert(experts=changed)
    assert merge(recipe)["overrides"] == [{"match": "*.experts.1.*", "noise": 0.1, "scale": 0.5}]


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("mixtral", "mixtral"),
        ("Mixtral", "mixtral"),
        ("deepseek", "deepseek"),
        ("qwen moe", "qwen2-moe"),
        ("qwen", "auto"),
    ],
)
def test_an_architecture_is_known_by_its_beginning(convert, architecture, target):
    shared = [{"source_model": "org/base", "positive_prompts": ["a"]}] if target == "qwen2-moe" else None
    assert merge(convert(architecture=architecture, shared_experts=shared))["target"] == target


@pytest.mark.parametrize(("prompts", "target"), [(["hello"], "auto"), (None, "deepseek")])
def test_a_shared_expert_decides_about_the_family_as_in_mergekit(convert, prompts, target):
    shared = {"source_model": "org/base", "residual_scale": 0.1} | ({"positive_prompts": prompts} if prompts else {})
    recipe = convert(shared_experts=[shared])
    assert merge(recipe)["target"] == target
    assert merge(recipe)["shared"] == {"model": "base"} | ({"prompts": prompts} if prompts else {})
    assert merge(recipe)["overrides"] == [{"match": "*.shared_expert*_proj.weight", "scale": 0.1}]


def test_keys_that_mergekit_passes_over_are_told(convert):
    recipe = convert(gate_dtype="float32", experts=[{**EXPERTS[0], "positve_prompts": ["x"]}, EXPERTS[1]])
    told = "\n".join(recipe.warnings)
    assert "gate_dtype: mergekit knows no such key here" in told
    assert "did you mean 'positive_prompts'?" in told


@pytest.mark.parametrize(
    ("sections", "place", "what", "fix"),
    [
        ({"base_model": None}, "", "needs a base model", "add base_model: MODEL"),
        ({"gate_mode": "hiden"}, "gate_mode", "no gate mode 'hiden'", "did you mean 'hidden'?"),
        ({"architecture": "olmoe"}, "architecture", "no 'olmoe'", "write one of: mixtral"),
        ({"dtype": "int8"}, "dtype", "cannot be stored as int8", "bfloat16"),
        ({"experts_per_token": "many"}, "experts_per_token", "expected a number", "write a number"),
        ({"experts_per_token": 3}, "experts_per_token", "cannot be sent to 3 of 2", "at most 2"),
        ({"experts": [*EXPERTS, {"positive_prompts": ["x"]}]}, "experts.2", "needs a model", "- source_model: MODEL"),
        ({"experts": [{**EXPERTS[0], "noise_scale": "x"}]}, "experts.0.noise_scale", "expected a number", "a number"),
        ({"shared_experts": EXPERTS}, "shared_experts", "2 shared experts", "keep one"),
        ({"experts": [{"source_model": "org/a"}]}, "experts", "no expert has any", "gate: random"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(convert, sections, place, what, fix):
    with pytest.raises(RecipeError) as refused:
        convert(**sections)
    told = str(refused.value)
    assert what in told
    assert fix in told
    assert place in told
