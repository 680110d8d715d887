#!/usr/bin/env python3
"""Write the numbers that FusionBench and authors' own code give for methods that need data.

    git clone https://github.com/uiuctml/MergeBench                      # at b245648
    git clone https://github.com/gstoica27/ZipIt                         # at 1b6ca40
    git clone https://github.com/sidak/otfusion                          # at eb73ad6
    git clone https://github.com/samuela/git-re-basin                    # at ef40098
    git clone https://github.com/ahnobari/ActivationInformedMerging      # at e7eccd5
    git clone https://github.com/aladinD/SafeMERGE                       # at 2af08c1
    git clone https://github.com/sail-sg/lorahub                         # at df73afe
    git clone https://github.com/FlagOpen/FlagEmbedding                  # at 7ed43d6
    python -m venv fb && fb/bin/pip install torch==2.13.0 transformers==5.24.0 fusion-bench==0.2.33 POT==0.9.7
    fb/bin/python scripts/peers/data_reference.py .

Networks and rows are those of tests/peers/small.py, run in float64 without dropout. Of each result a sample of every
tensor is kept with its sum and norm, in tests/peers/data.safetensors. Of scripts that do more than define functions,
only the functions are run.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.optimize import linear_sum_assignment
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "tests" / "peers"
sys.path[:0] = [str(PEERS), str(Path(__file__).parent)]

import small  # noqa: E402  (found through the line above)
from authors_reference import functions, state  # noqa: E402
from checkpoints import noise, sample, summary  # noqa: E402

State = dict[str, torch.Tensor]
MODELS = "ab"
ALPHA, STEPS, RATE = 0.7, 8, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="numbers of FusionBench and of authors' own code, with data")
    parser.add_argument("clones", type=Path, help="folder with the repositories named above")
    clones = parser.parse_args().clones
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        merged = {
            "regmean": regmean(),
            "regmean-mergebench": mergebench(clones),
            "regmean-plus": regmean_plus(),
            "fisher": fisher(),
            "ada-merging-tensor": ada_merging("tensor"),
            "ada-merging-model": ada_merging("model"),
            "ot-fusion": ot_fusion(clones),
            "git-rebasin": git_rebasin(clones),
            "activation-scale": activation_scale(clones),
            "safemerge": safemerge(clones),
        }
        figures = {
            "wudi": wudi(),
            "zipit": zipit(clones),
            "lm-cocktail": lm_cocktail(clones),
            "lorahub": lorahub(clones),
        }
    numbers = {key: np.asarray(value, dtype=np.float64) for key, value in figures.items()}
    for method, result in merged.items():
        arrays = {name: result[name].double().numpy() for name in sorted(result)}
        numbers[f"{method}/samples"] = np.concatenate([sample(name, array) for name, array in arrays.items()])
        numbers[f"{method}/summary"] = np.stack([summary(array) for array in arrays.values()])
    save_file(numbers, PEERS / "data.safetensors", metadata={"fusion-bench": "0.2.33", "torch": torch.__version__})


def ids(model: str) -> torch.Tensor:
    return torch.tensor(small.rows(model))


def trainer(model: str) -> SimpleNamespace:
    """What FusionBench asks of one: all rows, in one batch."""
    batch = {"input_ids": ids(model)}
    return SimpleNamespace(get_train_dataloader=lambda: [batch], _train_batch_size=small.ROWS, _prepare_inputs=dict)


def regmean() -> State:
    from fusion_bench.method.regmean.regmean import regmean_merging

    models = [small.bert(name) for name in MODELS]
    counts = [small.ROWS] * len(MODELS)
    merged: State = regmean_merging(models, [trainer(name) for name in MODELS], [], counts, ALPHA)
    return merged


def mergebench(clones: Path) -> State:
    """The Gram matrices, and how they are reduced, are MergeBench's; it solves with a plain inverse."""
    known = functions(clones / "MergeBench" / "merging" / "merging_methods" / "regmean_utils.py")
    known |= {"nn": nn, "tqdm": lambda each, **_: each}
    device = SimpleNamespace(args=SimpleNamespace(device="cpu"), _prepare_inputs=dict)
    models = [small.bert(name) for name in MODELS]
    loaders = [({"input_ids": ids(name)},) for name in MODELS]
    grams = [known["compute_grams"](device, model, rows) for model, rows in zip(models, loaders, strict=True)]
    merged = {}
    for name in grams[0]:
        reduced = [known["reduce_non_diag"](gram[name], ALPHA) for gram in grams]
        weights = [model.get_submodule(name).weight for model in models]
        right = sum(gram @ weight.T for gram, weight in zip(reduced, weights, strict=True))
        merged[f"{name}.weight"] = (torch.inverse(sum(reduced)) @ right).T
    return merged


def regmean_plus() -> State:
    """The blocks; FusionBench leaves what is behind them as the base has it."""
    from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus

    class OfBert(RegMeanAlgorithmPlusPlus):
        def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> State:
            states = [model.state_dict() for model in models_to_merge_dict.values()]
            names = [name for name in states[0] if ".embeddings." in name]
            return {name: torch.stack([each[name] for each in states]).mean(0) for name in names}

        def get_input_for_first_layer(self, model: nn.Module, train_dataset: Any) -> list[torch.Tensor]:
            return [model.bert.embeddings(train_dataset)]

        def get_layers(self, model: nn.Module) -> nn.ModuleList:
            layers: nn.ModuleList = model.bert.encoder.layer
            return layers

        def update_merged_params_dict(
            self, merged_params_dict: State, new_merged_params: State, layer_idx: int
        ) -> State:
            named = {f"bert.encoder.layer.{layer_idx}.{name}": value for name, value in new_merged_params.items()}
            return merged_params_dict | named

        def layer_batches_forward(self, layer: nn.Module, batches_input: list[torch.Tensor]) -> list[torch.Tensor]:
            return [_first(layer(batch)) for batch in batches_input]

        def get_regmean_weights(
            self,
            name: str,
            layer: nn.Module,
            batches_input: list[torch.Tensor],
            linear_modules_to_merge: dict[str, Any],
        ) -> State:
            return _grams(partial(self.layer_batches_forward, layer, batches_input), linear_modules_to_merge)

    asked = OfBert(
        num_regmean_examples=small.ROWS,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=ALPHA,
        weight_transpose=True,
    )
    merged = asked.run(_pool())
    return {name: value for name, value in merged.state_dict().items() if "encoder.layer" in name}


def _pool() -> Any:
    from fusion_bench.modelpool import BaseModelPool

    models = {"_pretrained_": small.bert("base"), **{name: small.bert(name) for name in MODELS}}
    pool = BaseModelPool(models)
    pool.load_train_dataset = ids
    return pool


def _first(given: Any) -> torch.Tensor:
    first: torch.Tensor = given[0] if isinstance(given, tuple) else given
    return first


def _grams(run: Callable[[], Any], layers: dict[str, nn.Module]) -> State:
    """What goes into linear layers while something runs: the mean of x x^T."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    inputs = {name: torch.cat(each) for name, each in seen.items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


def information(model: str) -> State:
    """Made-up diagonal Fisher information, so that only the merging is compared."""
    shapes = {name: tuple(value.shape) for name, value in small.bert(model).named_parameters()}
    return {
        name: torch.from_numpy(noise(f"fisher/{model}/{name}", shape) ** 2 + 0.01) for name, shape in shapes.items()
    }


def fisher() -> State:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    states = [dict(small.bert(name).named_parameters()) for name in MODELS]
    merged: State = merging_with_fisher_weights(
        {name: [each[name] for each in states] for name in states[0]},
        [information(name) for name in MODELS],
        torch.ones(len(MODELS)) / len(MODELS),
        normalize_fisher_weight=True,
        minimal_fisher_weight=1e-12,
    )
    return merged


def ada_merging(per: str) -> State:
    """FusionBench's merged model and loss, without dropout, all rows in every step."""
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
    from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel

    base, models = small.bert("base"), [small.bert(name) for name in MODELS]
    with torch.enable_grad():
        count = len(list(base.parameters()))
        start = torch.full((len(MODELS), count) if per == "tensor" else (len(MODELS),), 0.3, dtype=torch.float64)
        kind = LayerWiseMergedModel if per == "tensor" else TaskWiseMergedModel
        merged = kind(start, base, models, strict=False)
        adam = torch.optim.Adam([merged.merge_weight], lr=RATE)
        merged.merge_weights()
        for _ in range(STEPS):
            loss = sum(entropy_loss(merged(input_ids=ids(name)).logits, eps=0.0) for name in MODELS)
            adam.zero_grad()
            loss.backward()
            adam.step()
            merged.merge_weights()
    return {name: value.detach() for name, value in merged.merge_and_unload().named_parameters()}


def wudi() -> list[float]:
    """What FusionBench's 300 steps of Adam leave of the loss that wudi makes smallest, a number for each matrix."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    base = state("base")
    names = [name for name in base if "layers.0." in name and "_proj" in name]
    deltas = [{name: value[name] - base[name] for name in names} for value in map(state, "abcd")]
    with torch.enable_grad():
        found = wudi_merging([dict(each) for each in deltas], accelerator="cpu")
    return [_disturbed(found[name].detach(), [each[name] for each in deltas]) for name in sorted(found)]


def _disturbed(merged: torch.Tensor, deltas: list[torch.Tensor]) -> float:
    return sum(float(((merged - delta) @ delta.T).square().sum() / delta.square().sum()) for delta in deltas)


def alike(models: int) -> torch.Tensor:
    """Covariances of the units of so many made-up networks."""
    said = torch.from_numpy(noise("zipit/shared", (60, 12)) @ noise("zipit/mix", (12, 8 * models)))
    return torch.cov((said + torch.from_numpy(noise("zipit/own", said.shape))).T)


def zipit(clones: Path) -> list[int]:
    """Of each unit the joint unit that it is a part of: two networks, then three; as many joins within as there are."""
    run = functions(clones / "ZipIt" / "matching_functions.py")["match_tensors_zipit"]
    found: list[int] = []
    for models, alpha in ((2, 0.3), (2, 1.0), (3, 1.0)):
        joined = run({"covariance": alike(models)}, r=1 - 1 / models, a=alpha, b=1.0)[1]
        found += joined.argmax(1).tolist()
    return found


def ot_fusion(clones: Path) -> State:
    """The second of their networks is the one that the other is carried to; the last layer is averaged."""
    import ot

    folder = clones / "otfusion"
    known = functions(folder / "wasserstein_ensemble.py", ot=ot)
    metric = functions(folder / "ground_metric.py", isnan=torch.isnan)
    asked = SimpleNamespace(
        gpu_id=-1,
        exact=True,
        correction=True,
        proper_marginals=False,
        past_correction=True,
        skip_last_layer=True,
        ensemble_step=0.5,
        importance=None,
        unbalanced=False,
        debug=False,
        eval_aligned=False,
    )
    known["GroundMetric"] = lambda _: SimpleNamespace(
        process=lambda x, y: metric["_cost_matrix_xy"](
            SimpleNamespace(params=SimpleNamespace(dist_normalize=False)), x, y, squared=False
        )
    )
    networks = [network(small.mlp(name)) for name in MODELS]
    layers = known["get_wassersteinized_layers_modularized"](asked, networks)
    return dict(zip(small.mlp("a"), layers, strict=True))


def network(weights: State) -> nn.Module:
    made = nn.Module()
    made.layers = nn.ModuleList(nn.Linear(*reversed(weight.shape), bias=False) for weight in weights.values())
    made.load_state_dict(weights)
    return made


def git_rebasin(clones: Path) -> State:
    """Units by the correlations of their activations; the correlations are the authors'."""
    source = (clones / "git-re-basin" / "src" / "online_stats.py").read_text()
    known: dict[str, Any] = {}
    exec(source.replace("import jax.numpy as jnp", "import numpy as jnp"), known)
    first, second = small.mlp("a"), small.mlp("b")
    said = [small.inputs().double().numpy()] * 2
    permutation, merged = np.arange(small.WIDTHS[0]), {}
    for name in first:
        rows = np.arange(len(first[name]))
        said = [each @ state[name].double().numpy().T for each, state in zip(said, (first, second), strict=True)]
        if len(merged) < len(first) - 1:
            said = [np.maximum(each, 0) for each in said]
            rows = linear_sum_assignment(_correlation(known, *said), maximize=True)[1]
        merged[name] = (first[name] + second[name][rows][:, permutation]) / 2
        permutation = rows
    return merged


def _correlation(known: dict[str, Any], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    begun = known["OnlineCovariance"].init(first.mean(0), second.mean(0))
    found: np.ndarray = begun.update(first, second).pearson_correlation()
    return found


def activation_scale(clones: Path) -> State:
    """AIM on a sum of two task vectors; weights only, as its authors have it, embeddings left out."""
    known = functions(clones / "ActivationInformedMerging" / "MergeModels" / "ActivationMerging" / "_utils.py")
    known |= {"tqdm": lambda each, **_: each, "partial": partial, "get_calib_dataset": lambda *_, **__: [ids("base")]}
    torch_bfloat16, torch.bfloat16 = torch.bfloat16, torch.float64  # they round to it
    try:
        base = small.bert("base")
        active = known["get_calib_feat"](base, None)
        layers = {
            name: layer for name, layer in base.named_modules() if hasattr(layer, "weight") and "embed" not in name
        }
        models = [dict(small.bert(model).named_modules()) for model in MODELS]
        deltas = {
            name: sum(0.5 * (each[name].weight - layer.weight) for each in models) for name, layer in layers.items()
        }
        found = known["apply_relaxation"](deltas, active, layers, base, 0.4)
    finally:
        torch.bfloat16 = torch_bfloat16
    return {f"{name}.weight": value for name, value in found.items()}


def safemerge(clones: Path) -> State:
    """A fine-tune, a safe one and the model before alignment are a, b and c; the base is the aligned one."""
    known = functions(clones / "SafeMERGE" / "utils.py")
    base = state("base")
    tensors = {"unaligned": state("c"), "aligned": base}
    sites = [name for name in base if "_proj" in name]
    known["AutoModelForCausalLM"] = SimpleNamespace(
        from_pretrained=lambda path, **_: SimpleNamespace(
            named_parameters=lambda: [(name, tensors[path][name]) for name in sites]
        )
    )
    projections = known["compute_safelora_projection_matrices"]("unaligned", "aligned", ["_proj"], "cpu")
    merged, tuned, safe = {}, state("a"), state("b")
    for name, projection in zip(sites, projections, strict=True):
        change = tuned[name] - base[name]
        cosine = known["compute_safelora_cos"](projection, torch.eye(change.shape[1]).double(), change, "cpu")
        share = 1.0 if cosine >= small.COSINE else 0.8
        merged[name] = base[name] + share * change + (1 - share) * (safe[name] - base[name])
    return merged


def lm_cocktail(clones: Path) -> list[float]:
    """Weights of three models by their losses on rows with classes."""
    path = clones / "FlagEmbedding" / "research" / "LM_Cocktail" / "LM_Cocktail" / "utils.py"
    batch = {"input_ids": ids("a"), "labels": torch.tensor(small.labels("a"))}
    known = functions(path, is_torch_npu_available=lambda: False)
    known["preprocess_data_for_llm"] = lambda **_: [batch]
    states = [small.bert(name).state_dict() for name in ("base", *MODELS)]
    weights: list[float] = known["compute_weights"](small.bert("base"), None, states, "decoder", [], 0.2)
    return weights


def lorahub(clones: Path) -> list[float]:
    """What a candidate's numbers take off its score."""
    run = functions(clones / "lorahub" / "lorahub" / "algorithm.py")["default_l1_regularization"]
    return [run([0.5, -1.5, 0.0, 0.25])]


if __name__ == "__main__":
    main()
