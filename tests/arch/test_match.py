import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch.match import describe, families, recognise, resolve, structural
from mergetool.arch.spec import check_shapes
from mergetool.errors import PlanError
from tests.arch.networks import MLP, ResNetCifar, ResNetTorchvision, TimmViT, transformer


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def llama():
    model, _ = transformer("LlamaForCausalLM")
    return shapes_of(model), model.config.to_dict()


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (ResNetCifar, "resnet"),
        (ResNetTorchvision, "resnet"),
        (lambda: ResNetTorchvision(bottleneck=True), "resnet-bottleneck"),
        (TimmViT, "timm-vit"),
        (lambda: transformer("BertForMaskedLM")[0], "bert"),
        (lambda: transformer("GPT2Model")[0], "gpt2"),
        (lambda: transformer("Qwen2ForCausalLM")[0], "llama"),
        (lambda: transformer("ViTForImageClassification")[0], "vit"),
        (MLP, None),
    ],
)
def test_names_tell_the_family(make, family):
    assert recognise(shapes_of(make())) == family


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architecture": "deit_small_patch16_224"}, "timm-vit"),
        ({"model_type": "martian"}, None),
    ],
)
def test_config_json_tells_the_family(config, family):
    assert recognise({}, config) == family


def test_every_family_says_what_it_is():
    assert all(family.about for family in families().values())


def test_an_unknown_checkpoint_is_told_which_file_to_write():
    with pytest.raises(PlanError, match="no known architecture has these 1 tensors") as caught:
        resolve(None, {"mystery.weight": (3, 3)})
    assert "llama" in caught.value.fix


def test_a_misspelt_family_is_told_the_nearest():
    with pytest.raises(PlanError, match="unknown architecture 'lama'") as caught:
        resolve("lama", {})
    assert caught.value.fix == "did you mean 'llama'?"
    with pytest.raises(PlanError) as caught:
        resolve("zzzzzzzz", {})
    assert "one of bert" in caught.value.fix


def test_a_tensor_that_no_entry_describes_is_refused_by_name(llama):
    shapes, config = llama
    with pytest.raises(PlanError, match=r"no entry describes the tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        resolve(None, {**shapes, "model.layers.0.self_attn.q_norm.weight": (4,)}, config)


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (
            "model.layers.1.mlp.down_proj.weight",
            (12, 21),
            r"gate_proj\.weight, axis 0: the axis has length 20, its layout 21: ffn\.1 = 21 "
            r"\(by model\.layers\.1\.mlp\.down_proj\.weight, axis 1\)",
        ),
        (
            "model.layers.0.self_attn.v_proj.weight",
            (13, 12),
            r"v_proj\.weight, axis 0: the axis has length 13, its layout 12: kv\.0 = 3 \(by config\.json\), vo\.0 = 4",
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            (13, 12),
            r"k_proj\.weight, axis 0: an axis of length 13 cannot hold kv\.0 = 3 \(by config\.json\), qk = \?",
        ),
        ("model.norm.weight", (12, 1), r"the tensor has 2 axes \(12, 1\), the architecture describes 1"),
        ("lm_head.weight", (21, 12), r"axis 0: the axis has length 2\d, its layout 2\d: vocab = 2\d \(by "),
    ],
)
def test_axes_that_share_a_space_must_agree(llama, tensor, shape, message):
    shapes, config = llama
    with pytest.raises(PlanError, match=message) as caught:
        resolve(None, {**shapes, tensor: shape}, config)
    assert "architecture llama" in caught.value.where


def test_a_number_of_heads_that_nothing_tells_is_asked_for(llama, tmp_path):
    shapes, _ = llama
    with pytest.raises(PlanError, match=r"size of 'kv\.0', config\.json has no 'num_attention_heads'") as caught:
        resolve(None, shapes)
    assert "`sizes: {num_attention_heads: N}`" in caught.value.fix

    path = tmp_path / "mine.yaml"
    path.write_text("extends: llama\nsizes: {num_attention_heads: 6, num_key_value_heads: 3}\n")
    spec = resolve(str(path), shapes)
    assert spec.spaces["q.0"].size == 2
    assert spec.family == "mine"


def test_numbers_of_config_json_that_cannot_be_are_refused(llama):
    shapes, config = llama
    with pytest.raises(PlanError, match=r"the size of 'kv\.0' would be 0, by config\.json"):
        resolve(None, shapes, {**config, "num_key_value_heads": 0})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_names_shapes_and_config_give_a_spec_or_an_error_of_ours(llama, data):
    shapes, config = llama
    names = data.draw(st.lists(st.sampled_from(sorted(shapes)), unique=True))
    odd = st.lists(st.integers(0, 24), max_size=4).map(tuple)
    changed = {name: data.draw(st.one_of(st.just(shapes[name]), odd)) for name in names}
    keys = ("num_attention_heads", "num_key_value_heads", "architectures", "model_type", "tie_word_embeddings")
    junk = st.one_of(st.none(), st.integers(-3, 9), st.just("llama"), st.just(["GPT2Model", 3]), st.booleans())
    config = {**config, **data.draw(st.dictionaries(st.sampled_from(keys), junk))}
    for architecture in (None, "llama", "mlp", "vgg", "resnet", "gpt2"):
        try:
            spec = resolve(architecture, changed, config)
        except PlanError:
            continue
        assert set(spec.tensors) == set(changed)
    assert set(describe(changed, config).tensors) == set(changed)


def test_a_checkpoint_under_another_prefix_is_the_same_network(llama):
    shapes, config = llama
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    assert resolve(None, bare, config).spaces == resolve(None, shapes, config).spaces


def test_describe_never_fails_and_still_tells_depth(llama):
    shapes, config = llama
    assert describe(shapes, config).family == "llama"
    unknown = describe({"encoder.block.0.w": (2, 3), "encoder.block.4.w": (2, 3), "norm.w": (3,), "scale": ()})
    assert unknown.family == "structural"
    assert unknown.groups == ()
    assert unknown.tensors["encoder.block.4.w"].depth == (1, 2)
    assert unknown.tensors["norm.w"].depth is None
    assert unknown.tensors["scale"].axes == ()


def test_models_of_other_shapes_are_refused_by_tensor():
    spec = structural({"a": (2, 3)})
    check_shapes(spec, {"a": (2, 3)}, "math")
    with pytest.raises(PlanError, match=r"math: a is \(2, 4\), the architecture structural has \(2, 3\)"):
        check_shapes(spec, {"a": (2, 4)}, "math")


def test_resolving_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, mergetool.arch.match as m; m.families(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
