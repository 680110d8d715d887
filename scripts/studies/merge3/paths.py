"""Searches of the path that data takes, on planted layers and on trained fine-tunes.

    python -m scripts.studies.merge3.paths FOLDER [--seeds 0 1 2] [--candidates 64] [--only planted trained]
    python -m scripts.studies.merge3.paths FOLDER --only planted --orders depth --candidates 256

Planted: a random Llama of six layers and 60 questions, right being what it answers; two copies with noise in two other
inner layers each, so that a path around all noise answers everything. Trained: the small language model of this study
with four layers, and its fine-tunes on two skills, asked both; nobody knows the best path. Half of all items are for
the search, all of which a candidate is asked, half for the report; in the planted worlds all are for both.

The space, and what a point of it stands for, are those of `method: data-flow`, proposed by mergetool's own engines;
networks are put together from the layers of their parents in memory. In both orders of the row, without scales:
`models` lines up all layers of one model after the other, twice; `depth` those of one height beside each other, once.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergetool.methods.data_flow import DataFlow
from mergetool.search.engines import make_engine
from mergetool.search.space import Point, SearchSpace
from mergetool.tensors.folder import open_model

from .models import Training, prepare
from .skills import items

POPULATION = 16
ROWS = {"models": {"order": "models", "repeats": 2}, "depth": {"order": "depth", "repeats": 1}}
ENGINES = ("ga", "tpe", "cma-es", "random")
TRAINING = Training(hidden=96, num_layers=4, pretrain_steps=1200, pretrain_rate=2e-3)
PARENTS = ("rank", "tally")
PLANTED, LAYERS, WIDTH, WORDS, CHOICES = 60, 6, 48, 64, 4
NOISE, NOISY = 0.7, ((1, 3), (2, 4))
"""Standard deviations of a matrix, and the layers of each parent that get as much."""


@dataclass(frozen=True)
class Paths:
    """Parents, and what can be asked of networks made of their layers."""

    parents: dict[str, LlamaForCausalLM]
    folder: Path
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Groups of questions of one length: tokens, choices, and the place of the right one."""
    search: np.ndarray
    report: np.ndarray

    def space(self, row: str) -> tuple[DataFlow, SearchSpace]:
        method = DataFlow(tasks=({"name": "any"},), **ROWS[row])
        method = method.settled({name: open_model(self.folder / name) for name in self.parents})
        return method, method.space(tuple(self.parents))

    def network(self, method: DataFlow, space: SearchSpace, point: Point) -> LlamaForCausalLM:
        """The first parent with the layers of a path."""
        slices = method.arranged(space.values(point), tuple(self.parents))["slices"]
        layers = [
            self.parents[name].model.layers[place]
            for part in slices
            for name, (start, end) in part.items()
            for place in range(start, end)
        ]
        return stacked(next(iter(self.parents.values())), layers)

    @torch.inference_mode()
    def answers(self, model: LlamaForCausalLM) -> np.ndarray:
        """1 for each question whose right choice is the likeliest."""
        found = []
        for tokens, choices, right in self.asked:
            logits = model(input_ids=tokens).logits[:, -1]
            found.append((logits.gather(1, choices).argmax(1) == right).double())
        return torch.cat(found).numpy()


def stacked(first: LlamaForCausalLM, layers: Sequence[nn.Module]) -> LlamaForCausalLM:
    """Another network that shares its parts with others."""
    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**{**first.config.to_dict(), "num_hidden_layers": 1}))
    made.model.embed_tokens, made.model.norm, made.lm_head = first.model.embed_tokens, first.model.norm, first.lm_head
    made.model.rotary_emb, made.model.layers = first.model.rotary_emb, nn.ModuleList(layers)
    made.config.num_hidden_layers = len(layers)
    made.config.use_cache = False  # layers of one height would share their place in it
    return made.eval()


def mean(parents: Sequence[LlamaForCausalLM]) -> LlamaForCausalLM:
    """The average of their weights."""
    made = LlamaForCausalLM(parents[0].config).eval()
    states = [parent.state_dict() for parent in parents]
    made.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return made


def planted(folder: Path, seed: int) -> Paths:
    """A network that knows all answers, and two copies with noise in some of its layers."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
    whole = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0)).eval()
    tokens = torch.randint(1, WORDS, (PLANTED, 5))
    with torch.no_grad():
        logits = whole(input_ids=tokens).logits[:, -1]
    choices = logits.topk(CHOICES).indices[:, torch.randperm(CHOICES)]
    right = logits.gather(1, choices).argmax(1)
    parents = {}
    for name, noisy in zip("ab", NOISY, strict=True):
        parents[name] = _disturbed(whole, noisy, seed)
        parents[name].save_pretrained(folder / name)
    every = np.ones(PLANTED, dtype=bool)
    return Paths(parents, folder, [(tokens, choices, right)], every, every)


def _disturbed(whole: LlamaForCausalLM, noisy: Sequence[int], seed: int) -> LlamaForCausalLM:
    made = LlamaForCausalLM(whole.config).eval()
    made.load_state_dict(whole.state_dict())
    generator = torch.Generator().manual_seed(1000 * seed + noisy[0])
    with torch.no_grad():
        for place in noisy:
            for value in made.model.layers[place].parameters():
                if value.dim() == 2:
                    value.add_(NOISE * value.std() * torch.randn(value.shape, generator=generator))
    return made


def trained(folder: Path, seed: int, pool: int) -> Paths:
    """Fine-tunes on two skills, asked both; the seed deals the items out."""
    models = {name: LlamaForCausalLM.from_pretrained(folder / name).eval() for name in PARENTS}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / PARENTS[0])
    groups: dict[int, list[tuple[list[int], list[int], int]]] = {}
    for skill in PARENTS:
        for item in items(skill, 2 * pool):
            tokens = tokenizer(item.question)["input_ids"]
            choices = tokenizer.convert_tokens_to_ids(list(item.choices))
            groups.setdefault(len(tokens), []).append((tokens, choices, item.label))
    asked = [tuple(map(torch.tensor, zip(*group, strict=True))) for group in groups.values()]
    search = np.random.default_rng(seed).permutation(sum(map(len, groups.values()))) % 2 == 0
    return Paths(models, folder, asked, search, ~search)


def searched(world: Paths, row: str, engine: str, seed: int, candidates: int) -> dict[str, Any]:
    """What one search finds: its score on report items, and its path."""
    method, space = world.space(row)
    asks = make_engine(
        engine, len(space.genes), POPULATION, seeds=[space.point(space.start)], seed=seed, snap=space.snap
    )
    tried: dict[Point, np.ndarray] = {}
    while True:
        points = asks.ask()
        for point in points:
            if point not in tried:
                tried[point] = world.answers(world.network(method, space, point))
        scores = {point: float(tried[point][world.search].mean()) for point in points}
        asks.tell(points, np.array([[scores[point]] for point in points]))
        candidates -= len(points)
        if candidates <= 0:
            break
    best = max(tried, key=lambda point: float(tried[point][world.search].mean()))
    path = method.arranged(space.values(best), tuple(world.parents))["slices"]
    return {"found": float(tried[best][world.report].mean()), "tried": len(tried), "path": path}


def study(
    folder: Path, make: Callable[[int], Paths], seeds: Sequence[int], orders: Sequence[str], candidates: int
) -> list[dict[str, Any]]:
    """All searches of one kind of world; FOLDER gets a file, and what is in it is not made again."""
    rows = []
    for seed in seeds:
        path = folder / f"paths-{'-'.join(orders)}-{candidates}-{seed}.json"
        if not path.exists():
            world = make(seed)
            alone = {**world.parents, "the average of their weights": mean(list(world.parents.values()))}
            found: dict[str, Any] = {
                name: {"found": float(world.answers(model)[world.report].mean())} for name, model in alone.items()
            }
            for row in orders:
                for engine in ENGINES:
                    found[f"{row}, {engine}"] = searched(world, row, engine, seed, candidates)
                    print(f"seed {seed}, {row}, {engine}: {found[f'{row}, {engine}']}", flush=True)
            path.write_text(json.dumps(found) + "\n")
        rows.append(json.loads(path.read_text()))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| network | of each seed | mean | different paths tried | the path of the first seed |", "|---" * 5 + "|"]
    for name in rows[0]:
        each = [row[name] for row in rows]
        values = [one["found"] for one in each]
        tried = " ".join(str(one.get("tried", "")) for one in each)
        path = " ".join(f"{m}{list(span)}" for part in each[0].get("path", []) for m, span in part.items())
        told = " ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {told} | {np.mean(values):.3f} | {tried} | {path} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--pool", type=int, default=100, help="search items of each skill")
    parser.add_argument("--only", nargs="+", default=["planted", "trained"])
    parser.add_argument("--orders", nargs="+", default=list(ROWS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for kind in asked.only:
        folder = asked.folder / f"paths-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "trained":
            prepare(asked.folder / "four", TRAINING, print)
        worlds = {
            "planted": lambda seed, at=folder: planted(at / f"models-{seed}", seed),
            "trained": lambda seed: trained(asked.folder / "four", seed, asked.pool),
        }
        print(
            f"\n{kind}\n\n{table(study(folder, worlds[kind], asked.seeds, asked.orders, asked.candidates))}", flush=True
        )


if __name__ == "__main__":
    main()
