"""Models from the Hub: resolved, planned from headers, fetched once, recorded; and every way in which that can fail."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.files import content, tensors, write_model, write_recipe
from tests.forks import free_port
from tests.hub.conftest import HASTY, SHAPES, model_folder
from tests.hub.server import TOKEN


def test_a_run_fetches_what_it_needs_and_gives_the_bytes_of_local_models(hub, call, recipe, tmp_path):
    done = call("run", recipe)
    assert done.code == 0, done.err
    local = write_recipe(
        tmp_path / "local.yaml",
        models={"a": "made/a", "b": "made/b"},
        merge={"method": "linear"},
        output={"path": "local"},
    )
    assert call("run", local).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert hub.asked("training_args") == []
    assert not any(token for _, path, token in hub.requests if path.startswith("cdn"))
    lock = json.loads((tmp_path / "out" / "mergetool.json").read_text())
    commit = hub.refs("org/a")["main"]
    assert lock["origins"]["a"] == [{"reference": "org/a", "licence": "apache-2.0", "repo": "org/a", "commit": commit}]
    assert (tmp_path / "hf" / "hub" / "models--org--a" / "snapshots" / commit / "model.safetensors").is_file()


def test_a_plan_reads_headers_and_no_weights(hub, call, recipe):
    done = call("plan", recipe, "--json")
    assert done.code == 0, done.err
    assert done.answer["bytes_to_download"] > 2 * 32 * 32 * 4
    assert [step["name"] for step in done.answer["steps"]] == sorted(SHAPES)
    large = hub.files("org/a")["model.safetensors"]["size"]
    assert not any(path.startswith("cdn") and method == "HEAD" for method, path, _ in hub.requests)
    assert len(hub.asked("^cdn/files")) == 2
    assert hub.sent < 2 * large + 20_000


def test_a_plan_of_a_bundle_knows_the_size_of_what_is_not_here_yet(hub, call, tmp_path):
    recipe = write_recipe(
        tmp_path / "bundle.yaml",
        base="org/base",
        models={"a": "org/a", "b": "org/b"},
        merge={"method": "tsv-compress"},
        output={"path": "out"},
    )
    planned = {file["name"]: file["bytes"] for file in call("plan", recipe, "--json").answer["files"]}
    done = call("run", recipe)
    assert done.code == 0, done.err
    assert (tmp_path / "out/base/model.safetensors").stat().st_size == planned["base/model.safetensors"]


def test_mistakes_show_before_anything_large_is_fetched(hub, call, recipe, tmp_path):
    write_model(tmp_path / "wide", tensors(1, dict.fromkeys(SHAPES, (64, 40))))
    hub.upload("org/wide", tmp_path / "wide")
    for command in (("validate", recipe, "--online"), ("run", recipe)):
        done = call(*command, "--set", "models.b=org/wide")
        assert done.code == 4
        assert "shape [64, 40] in model 'b'" in done.err
    assert call("validate", recipe, "--set", "models.b=org/nothing").code == 0
    for commit in (tmp_path / "hf" / "hub").glob("models--*/snapshots/*"):
        assert not (commit / "model.safetensors").exists()


def test_revisions_are_pinned_and_a_commit_in_the_cache_asks_for_nothing(hub, call, recipe, tmp_path):
    old = hub.refs("org/a")["main"]
    hub.upload("org/a", model_folder(tmp_path / "new", 7))
    pinned = ("run", recipe, "--set", f"models.a=org/a@{old}", "--set", f"models.b=org/b@{hub.refs('org/b')['main']}")
    assert call(*pinned, "-o", "one").code == 0
    asked = len(hub.requests)
    assert call(*pinned, "-o", "two").code == 0
    assert len(hub.requests) == asked
    assert content(tmp_path / "one") == content(tmp_path / "two")
    a, b = (tensors(seed, SHAPES) for seed in (1, 2))
    merged = load_file(tmp_path / "one" / "model.safetensors")
    assert all(merged[name].equal((a[name] + b[name]) / 2) for name in SHAPES)


def test_offline_takes_what_the_cache_holds_and_says_what_it_lacks(hub, call, recipe):
    lacking = call("run", recipe, "--json", HF_HUB_OFFLINE="1")
    assert (lacking.code, lacking.answer["error"]) == (8, "HubError")
    assert "HF_HUB_OFFLINE" in lacking.answer["fix"]
    assert hub.requests == []
    assert call("run", recipe).code == 0
    asked = len(hub.requests)
    assert call("run", recipe, "-o", "again", HF_HUB_OFFLINE="1").code == 0
    assert len(hub.requests) == asked
    nobody = f"http://127.0.0.1:{free_port()}"
    assert call("run", recipe, "-o", "down", HASTE="50", HF_ENDPOINT=nobody).code == 0


def test_a_folder_of_that_name_wins_and_a_missing_path_is_called_one(hub, call, recipe, tmp_path):
    model_folder(tmp_path / "org" / "a", 5)
    done = call("plan", recipe, "--json", "--set", "models.b=hf://org/b")
    assert (done.code, done.answer["origins"]["a"][0]["repo"]) == (0, None)
    for source, fix in (("org/b", "hf://org/b"), ("./c", "check the path"), ("c", "check the path")):
        done = call("plan", recipe, "--json", "--set", f"models.b={source}")
        assert (done.code, done.answer["what"]) == (3, "no such file or folder")
        assert str(tmp_path) in done.answer["where"]
        assert fix in done.answer["fix"]


def test_adapters_and_bases_come_from_the_hub_too(hub, call, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.mlp"
    shapes = {f"{name}.lora_A.weight": (2, 32), f"{name}.lora_B.weight": (32, 2)}
    write_model(folder, tensors(9, shapes), file="adapter_model.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.upload("org/lora", folder)
    models = {"chat": {"source": "org/base", "adapters": ["org/lora"]}, "b": "org/b"}
    write_recipe(tmp_path / "r.yaml", base="org/base", models=models, merge={"method": "task-arithmetic"})
    planned = call("plan", "r.yaml", "--json")
    assert planned.code == 0, planned.err
    assert [origin["licence"] for origin in planned.answer["origins"]["chat"]] == ["apache-2.0", "mit"]
    assert call("run", "r.yaml", "-o", "out").code == 0
    base, b = (tensors(seed, SHAPES)["model.layers.0.mlp.weight"].double() for seed in (0, 2))
    low = tensors(9, shapes)
    delta = 2.0 * low[f"{name}.lora_B.weight"].double() @ low[f"{name}.lora_A.weight"].double()
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.weight"]
    assert (merged.double() - (base + delta + (b - base))).abs().max() < 1e-5
    assert call("run", "r.yaml", "-o", "short", "--set", "models.chat={adapter: org/lora}").code == 0
    assert (tmp_path / "short/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert re.search("adapter: org/lora@[0-9a-f]{40}", (tmp_path / "short/README.md").read_text())
    wrong = call("plan", "r.yaml", "--json", "--set", "models.b=org/lora")
    assert (wrong.code, wrong.answer["what"]) == (8, "is a LoRA adapter, not a model")


def test_adapters_by_themselves_are_planned_from_headers_and_name_their_base(hub, call, tmp_path):
    name = "base_model.model.model.layers.0.mlp"
    shapes = {f"{name}.lora_A.weight": (2, 32), f"{name}.lora_B.weight": (32, 2)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    for seed in (8, 9):
        folder = tmp_path / f"lora{seed}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        write_model(folder, tensors(seed, shapes), file="adapter_model.safetensors")
        hub.upload(f"org/lora{seed}", folder)
    models = {f"m{seed}": {"adapter": f"org/lora{seed}"} for seed in (8, 9)}
    write_recipe(tmp_path / "r.yaml", models=models, merge={"method": "linear"})
    planned = call("plan", "r.yaml", "--json")
    assert planned.code == 0, planned.err
    assert not list((tmp_path / "hf").rglob("adapter_model.safetensors"))
    done = call("run", "r.yaml", "-o", "out")
    assert done.code == 0, done.err
    made = load_file(tmp_path / "out/adapter_model.safetensors")
    halves = [tensors(seed, shapes) for seed in (8, 9)]
    wanted = sum(each[f"{name}.lora_B.weight"].double() @ each[f"{name}.lora_A.weight"].double() for each in halves)
    product = made[f"{name}.lora_B.weight"].double() @ made[f"{name}.lora_A.weight"].double()
    assert (product - wanted).norm() < 1e-6 * wanted.norm()  # 4 / 2 of each, by halves
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert re.search("adapter: org/lora8@[0-9a-f]{40}", (tmp_path / "out/README.md").read_text())


def test_folders_of_adapters_in_a_repository_are_told(hub, call, tmp_path):
    (tmp_path / "both/chat").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "both/chat" / name).write_text("{}")
    hub.upload("org/both", tmp_path / "both")
    models = {"chat": {"adapter": "org/both"}}
    write_recipe(tmp_path / "r.yaml", base="org/base", models=models, merge={"method": "task-arithmetic"})
    wrong = call("plan", "r.yaml", "--json")
    assert wrong.answer["what"] == "no LoRA adapter in the repository itself, but in its folders chat"
    assert wrong.answer["fix"].endswith(
        "hf download org/both --include 'chat/*' --local-dir both && echo name both/chat"
    )


@pytest.mark.parametrize(("made_for", "told"), [("org/other", True), ("ORG/Base", False), ("/home/me/base", False)])
def test_an_adapter_of_another_repository_is_told_and_a_pickled_one_is_fetched(hub, call, tmp_path, made_for, told):
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": made_for}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.mlp"
    low = tensors(9, {f"{name}.lora_A.weight": (2, 32), f"{name}.lora_B.weight": (32, 2)})
    torch.save(low, folder / "adapter_model.bin")
    hub.upload("org/lora", folder)
    models = {"chat": {"source": "org/base", "adapters": ["org/lora"]}}
    write_recipe(tmp_path / "r.yaml", models=models, merge={"method": "passthrough"})
    planned = call("plan", "r.yaml", "--json")
    assert planned.code == 0, planned.err
    assert (
        any(f"trained on {made_for}, and is applied to org/base" in text for text in planned.answer["warnings"]) == told
    )
    assert call("run", "r.yaml", "-o", "out").code == 0


def test_renamed_gated_private_and_missing_repositories_are_explained(hub, call, recipe):
    hub.renamed["org/old"] = "org/b"
    hub.gated.add("org/base")
    done = call("run", recipe, "--set", "models.b=org/old")
    assert done.code == 0
    assert "org/old is called org/b now" in done.err
    for source, token, words in (
        ("org/base", None, ("accept their conditions", "nobody is logged in")),
        ("org/base", TOKEN, ("accept their conditions", "the token that is set here has no access")),
        ("org/nothing", None, ("no such model on the Hub", "a folder of this name would have to be")),
        ("org/nothing", TOKEN, ("no such model on the Hub", "hf auth login")),
        ("org/a@v9", None, ("no such branch, tag or commit", "/org/a/commits")),
        ("org/a", "hf_wrong", ("does not accept the token", "hf auth login")),
    ):
        done = call("plan", recipe, "--json", "--set", f"models.b={source}", token=token)
        assert (done.code, done.answer["error"]) == (8, "HubError"), source
        text = f"{done.answer['what']} {done.answer['fix']}"
        assert all(word in text for word in words), text
        assert "hf_wrong" not in done.out + done.err


TROUBLES = {
    "too many requests": ("GET", "/api/models/org/b", 429, "too many requests"),
    "a problem of its own": ("GET", "/api/models/org/b", 500, "a problem of its own (500)"),
    "forbidden": ("GET", "cdn/files", 403, "the Hub forbids this"),
    "no answer": ("GET", "/api/models/org/b", ("stall", 8), "does not answer in time"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_is_explained_and_nothing_is_left_behind(hub, call, recipe, tmp_path, name):
    method, pattern, answer, words = TROUBLES[name]
    with hub.trouble(method, pattern, answer):
        done = call("run", recipe, "--json", **HASTY)
    assert (done.code, done.answer["error"]) == (8, "HubError"), done.err
    assert words in done.answer["what"]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert call("run", recipe).code == 0


def test_passing_trouble_is_sat_out(hub, call, recipe):
    with (
        hub.trouble("GET", "/api/models/org/b", 429, times=1, headers={"Retry-After": "0"}),
        hub.trouble("GET", "/api/models/org/a", 503, times=1),
        hub.trouble("GET", "cdn/files", ("cut", 1000), times=1),
    ):
        assert call("run", recipe, HASTE="50").code == 0
    assert len(hub.asked("/api/models/org/b/|/api/models/org/b$")) >= 2


@pytest.mark.parametrize(
    ("file", "result"),
    [
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("last.ckpt", "model.safetensors"),
    ],
)
def test_files_of_other_names_come_from_the_hub_too(hub, call, recipe, tmp_path, file, result):
    folder = tmp_path / "other"
    folder.mkdir()
    if file.endswith("safetensors"):
        write_model(folder, tensors(2, SHAPES), file=file)
    else:
        torch.save(tensors(2, SHAPES), folder / file)
    hub.upload("org/other", folder)
    asked = ("run", recipe, "--set", "models={a: org/other}", "--set", "merge={method: passthrough}")
    for output in ("one", "two"):
        done = call(*asked, "-o", output, **({"HF_HUB_OFFLINE": "1"} if output == "two" else {}))
        assert done.code == 0, done.err
        expected = tensors(2, SHAPES)
        found = load_file(tmp_path / output / result)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_of_two_sets_on_the_hub_the_one_that_transformers_opens_is_fetched(hub, call, recipe, tmp_path):
    folder = write_model(tmp_path / "both", tensors(2, SHAPES))
    write_model(folder, tensors(3, SHAPES), file="part.safetensors")
    weight_map = dict.fromkeys(SHAPES, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(tensors(4, SHAPES), folder / "pytorch_model.bin")
    hub.upload("org/both", folder)
    assert call("run", recipe, "--set", "models={a: org/both}", "--set", "merge={method: passthrough}").code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors(2, SHAPES).items())
    (snapshot,) = (tmp_path / "hf/hub/models--org--both/snapshots").iterdir()
    assert not {"part.safetensors", "pytorch_model.bin"} & {path.name for path in snapshot.iterdir()}


def test_repositories_without_weights_of_their_own_say_what_they_are(hub, call, recipe, tmp_path):
    pipeline = tmp_path / "pipeline"
    write_model(pipeline / "unet", tensors(1, SHAPES), file="diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    for folder, what in ((pipeline, "in its folders unet"), (quantised, "a GGUF file")):
        hub.upload(f"org/{folder.name}", folder)
        done = call("plan", recipe, "--json", "--set", f"models.a=org/{folder.name}")
        assert (done.code, what in done.answer["what"]) == (8, True), done.answer
        assert done.answer["fix"]
