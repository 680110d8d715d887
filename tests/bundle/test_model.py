"""The runtime over real (tiny) transformers models, against weights made by hand for every single sample."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.bundle.build import build
from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.manifest import read_manifest
from mergetool.bundle.readout import calibrated, pool_tokens
from mergetool.bundle.store import FactorStore
from mergetool.errors import PlanError, SourceError
from tests.bundle.tiny import OPTIONS, ROUTER, WIDTH, FileExperts, make_bundle, tiny_inputs, tiny_network, write_models

FAMILIES = ["bert", "vit", "llama", "t5", "gpt2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_bundle(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def bundles(folders):
    return {family: mergetool.load_bundle(folder) for family, folder in folders.items()}


def sample(inputs, index):
    return {key: value[index : index + 1] for key, value in inputs.items()}


def by_hand(folder, group):
    """Weights of a group of tasks, in float64, from the stored factors and nothing of the package."""

    def nearest(x):
        p, _, qh = torch.linalg.svd(x, full_matrices=False)
        return p @ qh

    manifest = json.loads((folder / "manifest.json").read_text())
    stored = [load_file(folder / manifest["tasks"][task]["factors"]) for task in group]
    weights = {name: value.double() for name, value in load_file(folder / "base" / "model.safetensors").items()}
    for name, parameter in manifest["parameters"].items():
        if parameter["policy"] == "full":
            weights[name] += torch.stack([each[f"{name}.delta"].double() for each in stored]).mean(0)
        elif parameter["policy"] == "svd":
            u = torch.cat([each[f"{name}.U"].double() for each in stored], 1)
            v = torch.cat([each[f"{name}.Vh"].double() for each in stored]).mT
            s = torch.cat([each[f"{name}.S"].double() for each in stored])
            update = (u * s) @ v.mT if len(group) == 1 else (nearest(u) * s) @ nearest(v).mT
            weights[name] += update.reshape(weights[name].shape)
    return weights


def output_by_hand(folder, family, group, inputs):
    """What the transformers model itself says with those weights."""
    with torch.inference_mode():
        output = tiny_network(family, by_hand(folder, group))(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


# One pass, every sample with its own weights


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_gets_the_weights_of_its_group(family, folders, bundles):
    inputs, model = tiny_inputs(family), bundles[family]
    groups = [(0,), (0, 2), (1,), (0, 1, 2), (0, 2), (2,), (0,)]
    found = model._second_pass(groups, inputs)
    networks = {group: tiny_network(family, by_hand(folders[family], group)) for group in set(groups)}
    for index, group in enumerate(groups):
        with torch.inference_mode():
            output = networks[group](**sample(inputs, index))
        expected = output.logits if "logits" in output else output.last_hidden_state
        torch.testing.assert_close(found[index], expected[0], rtol=0, atol=1e-4)


def test_groups_whose_inputs_are_shorter_are_run_without_the_padding_of_others(folders, bundles, monkeypatch):
    inputs, model = tiny_inputs("bert"), bundles["bert"]
    lengths = inputs["attention_mask"].sum(1).tolist()
    groups = [(0, 2) if length == min(lengths) else (1,) for length in lengths]
    seen = []
    run = model._pass
    monkeypatch.setattr("mergetool.bundle.batch._WORTH_SPLITTING", 0.9)
    monkeypatch.setattr(model, "_pass", lambda runs, part: seen.append(part["input_ids"].shape) or run(runs, part))
    found = model._second_pass(groups, inputs)
    assert sorted(shape[1] for shape in seen) == sorted(set(lengths))
    assert found.shape[:2] == inputs["input_ids"].shape
    for index, (group, length) in enumerate(zip(groups, lengths, strict=True)):
        expected = output_by_hand(folders["bert"], "bert", group, sample(inputs, index))[0]
        torch.testing.assert_close(found[index, :length], expected[:length], rtol=0, atol=1e-4)
        assert not found[index, length:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_gets_the_same_answer_alone_and_in_a_mixed_batch(family, bundles):
    inputs, model = tiny_inputs(family), bundles[family]
    together = model(**inputs)
    assert len(set(together.tasks)) > 1
    for index in range(7):
        alone = model(**sample(inputs, index))
        assert alone.task[0] == together.task[index]
        assert alone.tasks[0] == together.tasks[index]
        torch.testing.assert_close(alone.coefficients[0], together.coefficients[index], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffling_a_batch_shuffles_the_answers(family, bundles):
    inputs, model = tiny_inputs(family), bundles[family]
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    expected, found = model(**inputs), model(**{key: value[order] for key, value in inputs.items()})
    assert found.task == tuple(expected.task[index] for index in order)
    torch.testing.assert_close(found.logits, expected.logits[order], rtol=1e-5, atol=1e-5)


def test_only_weights_that_samples_share_cut_a_batch_into_groups(bundles):
    assert {family: model._grouped.mixable for family, model in bundles.items()} == {
        "bert": True,
        "vit": True,
        "llama": True,
        "gpt2": False,  # its linear layers are of a kind of their own
        "t5": False,  # its table of relative positions is the same for all samples of a batch
    }


def test_the_way_through_factors_and_through_dense_weights_agree(folders):
    model = mergetool.load_bundle(folders["bert"])
    inputs = tiny_inputs("bert")
    through_factors = model(**sample(inputs, 0)).logits
    made = [matrix for each in model._factors._groups.values() for matrix in each.matrices.values()]
    assert all(matrix.dense is None for matrix in made)
    for _ in range(30):
        model(**inputs)
    kept = [matrix for each in model._factors._groups.values() for matrix in each.matrices.values()]
    assert any(matrix.dense is not None for matrix in kept)
    torch.testing.assert_close(model(**sample(inputs, 0)).logits, through_factors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [1, 30_000])
def test_what_is_kept_of_groups_is_bounded_within_a_batch(most, folders):
    model = mergetool.load_bundle(folders["bert"], cache_bytes=most)
    inputs = tiny_inputs("bert")
    expected = mergetool.load_bundle(folders["bert"])(**inputs)
    for _ in range(12):  # so often that dense weights would pay
        torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=0, atol=1e-5)
        groups = model._factors._groups.values()
        matrices = [matrix for each in groups for matrix in each.matrices.values()]
        vectors = [vector for each in groups for vector in each.vectors.values()]
        held = sum(matrix.num_bytes for matrix in matrices) + sum(vector.nbytes for vector in vectors)
        largest = max(matrix.num_bytes for matrix in matrices)
        assert held == model._factors.num_bytes <= max(most, largest)  # the first one has come when it was alone


def test_what_one_group_needs_for_every_token_is_kept_in_any_case(folders):
    model = mergetool.load_bundle(folders["bert"], cache_bytes=1)
    model(tasks=["a"], **tiny_inputs("bert"))
    kept = dict(model._factors.changes((0,)).matrices)
    model(tasks=["a"], **tiny_inputs("bert"))
    assert kept
    assert all(model._factors.matrix((0,), name) is matrix for name, matrix in kept.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_is_stored_changes_by_use(family, folders, bundles):
    model = bundles[family]

    def state():
        factors = [value.clone() for stored in model._factors._stored for value in stored.values()]
        return factors + [value.clone() for value in model.base.state_dict().values()]

    before = state()
    for tasks in ("route", ["a"], ["a", "c"]):
        model(tasks=tasks, **tiny_inputs(family))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert read_manifest(folders[family]) == model.manifest
    assert not any("forward" in vars(module) for module in model.base.modules())


def test_a_group_of_tasks_is_merged_as_tsv_merge_does_it(folders):
    manifest = read_manifest(folders["bert"])
    factors = TaskFactors(manifest, folders["bert"], torch.float32, 1 << 30)
    experts = [
        mergetool.merge_state_dicts("passthrough", [load_file(folders["bert"] / "base" / "model.safetensors")])
        for _ in "ac"
    ]
    for expert, task in zip(experts, (0, 2), strict=True):
        for name, parameter in manifest.parameters.items():
            if parameter.policy != "skip":
                expert[name] += factors.dense_change((task,), name)
    base = load_file(folders["bert"] / "base" / "model.safetensors")
    merged = mergetool.merge_state_dicts("tsv-merge", experts, base, rank=1.0, filter="fusionbench")
    for name, parameter in manifest.parameters.items():
        if parameter.policy == "svd":
            expected = merged[name] - base[name]
            found = factors.dense_change((0, 2), name)
            assert float((found - expected).norm() / expected.norm()) < 1e-3, name


# Routing


def test_routing_reads_what_attention_mixes_unless_told_otherwise(bundles):
    first, num = {}, {}
    for family, model in bundles.items():
        matrices = model.manifest.router.matrices
        first[family], num[family] = matrices[0], len(matrices)
    assert first == {
        "bert": "encoder.layer.0.attention.output.dense.weight",
        "vit": "encoder.layer.0.attention.output.dense.weight",
        "llama": "model.layers.0.self_attn.o_proj.weight",
        "t5": "encoder.block.0.layer.0.SelfAttention.o.weight",
        "gpt2": "transformer.h.0.attn.c_proj.weight",
    }
    assert num == {"bert": 3, "vit": 3, "llama": 3, "t5": 2, "gpt2": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_pass_stops_at_the_last_matrix_it_reads(family, folders, tmp_path):
    names = {
        "bert": "*.layer.1.*query*",
        "vit": "*.layer.1.*query*",
        "llama": "*.layers.1.*q_proj*",
        "t5": "encoder.block.1.*.q.*",
        "gpt2": "*.h.1.*c_fc*",
    }
    router = replace(ROUTER, layers=(names[family],))
    model = mergetool.load_bundle(make_bundle(tmp_path, family, options=replace(OPTIONS, router=router)))
    assert len(model.manifest.router.matrices) == 1
    inputs, seen = tiny_inputs(family), {}
    (module,) = model.first_pass.modules
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.setdefault("z", arguments[0]))
    with torch.inference_mode():
        model.base(**inputs)  # the whole way
    hook.remove()
    ran = []
    hooks = [each.register_forward_hook(lambda each, *_: ran.append(each)) for each in model.base.modules()]
    with torch.inference_mode():
        (feature,) = model.first_pass.features(inputs)
    assert module not in ran
    assert model.base not in ran
    for each in hooks:
        each.remove()
    pooled = pool_tokens(seen["z"], inputs.get("attention_mask"), "mean")
    assert torch.equal(feature, pooled)


def test_matrices_that_are_stored_as_inputs_by_outputs_are_read_on_the_side_of_the_inputs(tmp_path):
    router = replace(ROUTER, layers=("*.h.1.*c_fc*",))
    model = mergetool.load_bundle(make_bundle(tmp_path, "gpt2", options=replace(OPTIONS, router=router)))
    ((basis, *_),) = model.first_pass.bases
    assert basis.shape == (8, WIDTH)
    torch.testing.assert_close(basis.mT, model._factors.of(0, "transformer.h.1.mlp.c_fc.weight").u)


def test_inputs_that_lie_where_a_task_changed_the_weights_go_to_that_task(tmp_path):
    """Plant it: embeddings whose rows, after the layers' first norm, are what one task's query matrix reads."""
    folder = make_bundle(
        tmp_path, "bert", options=replace(OPTIONS, router=replace(ROUTER, layers=("*.layer.0.*query*",)))
    )
    model = mergetool.load_bundle(folder)
    (bases,) = model.first_pass.bases
    for task, basis in enumerate(bases):
        z = torch.randn(5, len(basis)) @ basis
        model.first_pass.features = lambda inputs, z=z: [z]
        routing = model.route(input_ids=torch.ones(5, 3, dtype=torch.long))
        assert routing.coefficients.argmax(1).tolist() == [task] * 5
        assert all("abc"[task] in chosen for chosen in routing.tasks)


@pytest.mark.parametrize("features", ["base", "merged"])
def test_features_come_from_the_base_or_from_the_merge(features, tmp_path):
    router = replace(ROUTER, layers=("*query*",), features=features, redundancy=1.0)
    folder = make_bundle(tmp_path, "bert", options=replace(OPTIONS, router=router))
    model = mergetool.load_bundle(folder)
    assert (folder / "first_pass.safetensors").exists() == (features == "merged")
    inputs = tiny_inputs("bert")
    expected = model.base
    if features == "merged":
        expected = transformers.BertModel(model.base.config).eval()
        weights = by_hand(folder, (0, 1, 2))
        expected.load_state_dict({name: value.float() for name, value in weights.items()})
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    seen = {}
    place = model.manifest.router.matrices.index("encoder.layer.2.attention.self.query.weight")
    module = expected.get_submodule("encoder.layer.2.attention.self.query")
    module.register_forward_pre_hook(lambda _, arguments: seen.setdefault("z", arguments[0]))
    with torch.inference_mode():
        expected(**inputs)
        found = model.first_pass.features(inputs)[place]
    torch.testing.assert_close(found, pool_tokens(seen["z"], inputs["attention_mask"], "mean"), rtol=0, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.base.state_dict().items())


def test_the_redundancy_filter_leaves_a_copy_of_an_expert_out_of_the_first_pass(tmp_path):
    router = replace(ROUTER, features="merged", redundancy=0.3)
    folder = make_bundle(tmp_path, "bert", options=replace(OPTIONS, router=router), tasks="ab", classes=(2, 2))
    kept = [p.kept for p in read_manifest(folder).parameters.values() if p.policy == "svd"]
    assert set(kept) == {(0, 1)}
    copies = tmp_path / "copies"
    copies.mkdir()
    from mergetool.bundle.build import build
    from mergetool.bundle.store import FactorStore
    from tests.bundle.tiny import FileExperts

    models = tmp_path / "models"
    paths = {"base": models / "base", "a": models / "a", "again": models / "a", "b": models / "b"}
    build(FileExperts(paths), copies, FactorStore(tmp_path / "store"), replace(OPTIONS, router=router))
    assert {p.kept for p in read_manifest(copies).parameters.values() if p.policy == "svd"} == {(0, 2)}


def test_masked_tokens_do_not_count(bundles):
    inputs = tiny_inputs("bert")
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((7, 3), 39)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(7, 3, dtype=torch.long)], 1),
    }
    expected, found = bundles["bert"](**inputs), bundles["bert"](**longer)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mask", "expected"), [([1, 1, 0], (0, 0.5, 1)), ([0, 1, 1], (1, 1.5, 2)), (None, (0, 1, 2))])
def test_pooling_sees_unmasked_tokens_only(mask, expected):
    x = torch.arange(3.0).view(1, 3, 1)
    mask = None if mask is None else torch.tensor([mask])
    assert tuple(float(pool_tokens(x, mask, pool)) for pool in ("cls", "mean", "last")) == expected


def test_two_tasks_are_told_apart_by_their_likelihood(tmp_path):
    router = replace(ROUTER, norm="likelihood", mode="weighted")
    folder = make_bundle(tmp_path, "bert", tasks="ab", classes=(2, 3), options=replace(OPTIONS, router=router))
    answer = mergetool.load_bundle(folder)(**tiny_inputs("bert"))
    assert len({float(weights[0]) for weights in answer.coefficients}) == 7  # unlike 0.804 and 0.196 for all
    assert torch.equal(answer.coefficients.sum(1).round(decimals=5), torch.ones(7))


def test_copies_of_an_expert_share_their_inputs_and_answer_alike(tmp_path):
    from mergetool.bundle.build import build
    from mergetool.bundle.store import FactorStore
    from tests.bundle.tiny import FileExperts

    make_bundle(tmp_path, "bert", tasks="ab", classes=(2, 2))
    models, copies = tmp_path / "models", tmp_path / "copies"
    copies.mkdir()
    paths = {"base": models / "base", "a": models / "a", "again": models / "a"}
    router = replace(ROUTER, norm="likelihood", mode="weighted")
    build(FileExperts(paths), copies, FactorStore(tmp_path / "store"), replace(OPTIONS, router=router))
    model, inputs = mergetool.load_bundle(copies), tiny_inputs("bert")
    answer = model(**inputs)
    assert answer.tasks == (("a", "again"),) * 7
    torch.testing.assert_close(answer.coefficients, torch.full((7, 2), 0.5))
    torch.testing.assert_close(answer.logits, model(tasks=["a"], **inputs).logits, rtol=0, atol=1e-4)


def test_the_order_in_which_tasks_are_named_does_not_matter(bundles):
    model, inputs = bundles["bert"], tiny_inputs("bert")
    there, back = model(tasks=["a", "c"], **inputs), model(tasks=["c", "a"], **inputs)
    assert there.tasks == back.tasks
    assert torch.equal(there.logits, back.logits)


def test_a_bundle_that_was_moved_gives_the_same_bits(folders, tmp_path):
    copy = shutil.copytree(folders["bert"], tmp_path / "elsewhere")
    found, expected = (mergetool.load_bundle(folder)(**tiny_inputs("bert")) for folder in (copy, folders["bert"]))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.coefficients, expected.coefficients)


def test_one_task_needs_no_routing(tmp_path):
    model = mergetool.load_bundle(make_bundle(tmp_path, "bert", tasks="a"))
    answer = model(**tiny_inputs("bert"))
    assert answer.tasks == (("a",),) * 7
    assert answer.coefficients.tolist() == [[1.0]] * 7


# Heads


def test_the_chosen_head_reads_the_features_of_its_group(bundles, folders):
    answer = bundles["bert"](**tiny_inputs("bert"))
    for index, task in enumerate(answer.task):
        head = load_file(folders["bert"] / "heads" / f"{task}.safetensors")
        expected = answer.features[index] @ head["weight"].mT + head["bias"]
        torch.testing.assert_close(answer.logits[index, : len(expected)], expected)
        assert bool(answer.logits[index, len(expected) :].isneginf().all())


def test_a_task_that_is_forced_answers_by_itself(bundles):
    answer = bundles["bert"](tasks=["b"], **tiny_inputs("bert"))
    assert answer.task == ("b",) * 7
    assert answer.tasks == (("b",),) * 7
    assert int(answer.logits[0].isfinite().sum()) == 5


def test_heads_on_unequal_scales_are_compared_as_probabilities():
    loud, sure = torch.tensor([[100.0, 99.9]]), torch.tensor([[3.0, 0.0, 0.0]])
    claim = torch.tensor([0.5])
    assert calibrated(loud, claim, "max") > calibrated(sure, claim, "max")
    assert calibrated(loud, claim, "log-softmax") < calibrated(sure, claim, "log-softmax")
    assert calibrated(sure, torch.tensor([0.01]), "joint") < calibrated(loud, claim, "joint")
    assert float(calibrated(loud, claim, "mean")) == pytest.approx(99.95)


# Generation


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_each_prompt_is_continued_by_its_own_group(family, bundles, folders):
    model, inputs = bundles[family], tiny_inputs(family)
    inputs.pop("decoder_input_ids", None)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **options)
    routing = model.route(**inputs)
    assert len(set(routing.tasks)) > 1
    for index in (0, 3, 6):
        group = tuple(model.task_names.index(task) for task in routing.tasks[index])
        alone = tiny_network(family, by_hand(folders[family], group))
        expected = alone.generate(**sample(inputs, index), **options)[0]
        assert found[index, : len(expected)].tolist() == expected.tolist()


# Opening


def test_a_bundle_opens_through_automodel(folders):
    import mergetool.bundle.auto

    model = transformers.AutoModel.from_pretrained(folders["bert"])
    expected = mergetool.load_bundle(folders["bert"])(**tiny_inputs("bert"))
    assert torch.equal(model(**tiny_inputs("bert")).logits, expected.logits)
    config = transformers.AutoConfig.from_pretrained(folders["bert"])
    assert config.model_type == "mass"
    assert config.base_config["hidden_size"] == WIDTH


def test_a_bundle_opens_by_its_own_code(folders):
    model = transformers.AutoModel.from_pretrained(folders["bert"], trust_remote_code=True)
    assert model.task_names == ("a", "b", "c")


def test_a_base_that_is_only_referred_to_must_be_the_same(tmp_path):
    folder = make_bundle(tmp_path, "bert", options=replace(OPTIONS, base="reference"))
    assert not (folder / "base").exists()
    assert mergetool.load_bundle(folder)(**tiny_inputs("bert")).logits.shape == (7, 5)
    base = tmp_path / "models" / "base" / "model.safetensors"
    weights = load_file(base)
    weights["pooler.dense.bias"] += 1
    save_file(weights, base, {"format": "pt"})
    with pytest.raises(SourceError, match="another base"):
        mergetool.load_bundle(folder)
    base.unlink()
    with pytest.raises(SourceError, match="is missing"):
        mergetool.load_bundle(folder)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("factors/b.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "SHA-256"),
        ("heads/b.safetensors", lambda path: path.unlink(), "head is missing"),
        ("base/model.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"!"), "SHA-256"),
        ("manifest.json", lambda path: path.write_text("{"), "not valid JSON"),
        ("manifest.json", lambda path: path.write_text('{"format_version": 9}'), "format version 9"),
        ("manifest.json", lambda path: path.unlink(), "not a bundle"),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace('"topk"', '"tpok"')), "router.mode"),
    ],
)
def test_a_damaged_bundle_is_refused(folders, tmp_path, name, damage, says):
    folder = shutil.copytree(folders["bert"], tmp_path / "bundle")
    damage(folder / name)
    with pytest.raises(SourceError, match=says):
        mergetool.load_bundle(folder)


def test_what_cannot_be_answered_is_said(bundles, folders, tmp_path):
    model, inputs = bundles["bert"], tiny_inputs("bert")
    with pytest.raises(PlanError, match="no task 'x'"):
        model(tasks=["a", "x"], **inputs)
    with pytest.raises(PlanError, match="list of names"):
        model(tasks="a", **inputs)
    with pytest.raises(SourceError, match="batch is empty"):
        model(**{key: value[:0] for key, value in inputs.items()})
    with pytest.raises(SourceError, match="batch is empty"):
        model()
    with pytest.raises(SourceError, match="samples are empty"):
        model(input_ids=inputs["input_ids"][:, :0])
    masked = inputs | {"attention_mask": inputs["attention_mask"].clone()}
    masked["attention_mask"][3] = 0
    with pytest.raises(SourceError, match="every token of sample 3 is masked"):
        model(**masked)
    library = make_bundle(tmp_path, "bert", options=replace(OPTIONS, kind="tsv-compress", router=None))
    with pytest.raises(PlanError, match="no router"):
        mergetool.load_bundle(library)(**inputs)
    assert mergetool.load_bundle(library)(tasks=["a"], **inputs).task == ("a",) * 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_half_precision_answer_nearly_the_same(dtype, folders, tmp_path):
    exact = mergetool.load_bundle(folders["bert"])(tasks=["a"], **tiny_inputs("bert")).logits
    folder = make_bundle(tmp_path, "bert", options=replace(OPTIONS, dtype=dtype))
    found = mergetool.load_bundle(folder)(tasks=["a"], **tiny_inputs("bert")).logits
    assert 0 < float((found - exact).nan_to_num(0).abs().max()) < 0.05
    stored = load_file(folder / "factors" / "a.safetensors")
    name = "encoder.layer.0.intermediate.dense.weight"
    assert stored[f"{name}.U"].dtype == getattr(torch, dtype)
    assert stored[f"{name}.S"].dtype == torch.float32


def test_a_language_model_with_experts_of_a_mixture_gives_each_sample_its_groups_weights(tmp_path):
    """transformers joins what lies one by one in the checkpoint."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        pad_token_id=0,
    )
    paths = write_models(tmp_path / "models", transformers.MixtralForCausalLM(config), scale=0.1)
    (tmp_path / "bundle").mkdir()
    build(FileExperts(paths), tmp_path / "bundle", FactorStore(tmp_path / "store"), OPTIONS)
    inputs = tiny_inputs("llama")
    found = mergetool.load_bundle(tmp_path / "bundle")(tasks=["a", "c"], **inputs).logits
    weights = by_hand(tmp_path / "bundle", (0, 2))
    alone = transformers.MixtralForCausalLM.from_pretrained(
        None, config=config, state_dict={name: value.float() for name, value in weights.items()}
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found, alone(**inputs).logits, rtol=0, atol=1e-4)
