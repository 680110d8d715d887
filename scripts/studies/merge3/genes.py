"""Searches of 12 genes on real models: what 10, 15 and 40 times fewer items cost.

    python -m scripts.studies.merge3.genes FOLDER [--seeds 0 1 2] [--pool 600]

Models are those of `python -m scripts.studies.merge3 FOLDER`, trained where FOLDER has none: a small Llama, fine-tuned
on three skills. Every fine-tune has a weight of its own in each of the three layers and in the rest (embeddings, last
norm, head), 3 x 4 genes, and task arithmetic merges. All that decides a search is mergetool's own (engine, subsets,
estimators, re-ranking), as in the simulated curve; a candidate answers only the items that it is asked. Winners answer
items of the three skills that took no part in the search, half as many again; the seed deals the items out.

FOLDER gets a file for every seed, which is not made again, and the table is printed: 95 % intervals, paired by item,
and processor seconds of one thread, merging and the answers of base and parents included.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergetool.search.interval import of_difference, of_mean

from .curve import GENERATIONS, PARENTS, Asked, search
from .models import Training, prepare
from .skills import SKILLS, Item, items

GROUPS = ("layers.0.", "layers.1.", "layers.2.", "")
HIGHEST, UNIFORM = 1.5, 1 / 3
"""The largest weight, and that of the merge where a search begins."""
BATCH = 128
FULL = "all items"


def ways(pool: int) -> dict[str, Asked]:
    """How a search may ask, for so many search items of each task: about 10, 15 and 40 times less than everything."""
    tens, fifteens, forties = round(pool / 20), round(pool / 50), round(pool / 67)
    return {
        FULL: Asked(0, 0, stratified=False),
        f"{tens} of each task": Asked(tens, 5, stratified=True),
        f"{fifteens}": Asked(fifteens, 5, stratified=True),
        f"{forties}, any, two re-ranked": Asked(forties, 2, stratified=False),
        f"{fifteens}, four times the candidates": Asked(fifteens, 5, stratified=True, generations=4 * GENERATIONS),
    }


class Merges:
    """Merges of the fine-tunes as a search asks them; a point of the unit cube is a weight by fine-tune and group."""

    def __init__(self, folder: Path, pool: int, seed: int) -> None:
        held = [LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", *SKILLS)]
        self._base, *tuned = [{name: x.clone() for name, x in model.state_dict().items()} for model in held]
        self._deltas = {name: torch.stack([each[name] - x for each in tuned]) for name, x in self._base.items()}
        self._model = held[0].eval()
        self._live = self._model.state_dict()
        self.genes = len(tuned) * len(GROUPS)
        self.start = (UNIFORM / HIGHEST,) * self.genes
        rng = np.random.default_rng(seed)
        dealt = [[made[place] for place in rng.permutation(len(made))] for made in _items(5 * pool // 2)]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
        self._items = _encoded(tokenizer, [item for part in dealt for item in part])
        self.task = np.repeat(np.arange(len(dealt)), len(dealt[0]))
        self.report = np.tile(np.arange(len(dealt[0])) >= pool, len(dealt))

    def answers(self, point: Sequence[float], places: np.ndarray) -> np.ndarray:
        """1 for each of these items that the merge with these weights answers rightly."""
        self.put(point)
        asked = np.arange(len(self.task))[places]
        return self._right(asked).astype(float)

    @torch.inference_mode()
    def put(self, point: Sequence[float]) -> dict[str, Tensor]:
        """Merge into the model that stands ready, by task arithmetic. Returns its tensors."""
        weights = HIGHEST * torch.tensor(point, dtype=torch.float32).view(-1, len(GROUPS))
        for name, base in self._base.items():
            group = next(place for place, part in enumerate(GROUPS) if part in name)
            self._live[name].copy_(base + torch.tensordot(weights[:, group], self._deltas[name], 1))
        return self._live

    def known(self, others: int) -> np.ndarray:
        """Answers of the base and of each fine-tune to all items."""
        assert not others
        alone = np.eye(len(SKILLS)).repeat(len(GROUPS), axis=1) / HIGHEST
        return np.array([self.answers(point, ~np.zeros_like(self.report)) for point in (np.zeros(self.genes), *alone)])

    @torch.inference_mode()
    def _right(self, asked: np.ndarray) -> np.ndarray:
        """Whether the likeliest of the choices is the right one, items of about one length together."""
        found = np.zeros(len(asked), dtype=bool)
        order = sorted(range(len(asked)), key=lambda place: len(self._items[asked[place]][0]))
        for part in (order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)):
            told, choices, labels = zip(*(self._items[asked[place]] for place in part), strict=True)
            longest = max(map(len, told))
            inputs = torch.tensor([[0] * (longest - len(ids)) + ids for ids in told])
            logits = self._model(input_ids=inputs, attention_mask=(inputs != 0).long(), logits_to_keep=1).logits[:, -1]
            found[part] = (logits.gather(1, torch.tensor(choices)).argmax(1) == torch.tensor(labels)).numpy()
        return found


def _items(count: int) -> list[list[Item]]:
    return [items(skill, count) for skill in SKILLS]


def _encoded(tokenizer: PreTrainedTokenizerFast, asked: Sequence[Item]) -> list[tuple[list[int], list[int], int]]:
    """Question, choices and the place of the right one; 0 is the padding and occurs in no question."""
    told = tokenizer([item.question for item in asked])["input_ids"]
    choices = [tokenizer.convert_tokens_to_ids(list(item.choices)) for item in asked]
    return [(ids, each, item.label) for ids, each, item in zip(told, choices, asked, strict=True)]


def searched(folder: Path, pool: int, seed: int) -> dict[str, Any]:
    """What every way to ask finds: answers to the report items as text, and processor seconds."""
    path = folder / f"genes-{pool}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    world = Merges(folder / "models", pool, seed)
    known = world.known(0)[:, world.report]
    start = world.answers(world.start, world.report)
    found = {name: {"report": _text(row)} for name, row in zip(("base", *SKILLS), known, strict=True)}
    found["uniform merge"] = {"report": _text(start)}
    for name, asked in ways(pool).items():
        started = time.process_time()
        point = search(world, asked, seed)
        seconds = time.process_time() - started
        found[name] = {"report": _text(world.answers(point, world.report)), "seconds": seconds, "point": list(point)}
        print(f"seed {seed}, {name}: {_values(found[name]).mean():.3f}, {seconds:.0f} s", flush=True)
    path.write_text(json.dumps(found) + "\n")
    return found


def _text(answers: np.ndarray) -> str:
    return "".join(str(int(each)) for each in answers)


def _values(row: dict[str, Any]) -> np.ndarray:
    return np.array([float(each) for each in row["report"]])


def table(seeds: Sequence[dict[str, Any]], pool: int) -> str:
    """All seeds as Markdown: a mean over the seeds, its interval by items, and what each seed found."""
    rows = ["| asked of a candidate | times fewer | score found | of each seed | lost against all items | seconds |"]
    rows.append("|---" * 6 + "|")
    full = np.concatenate([_values(found[FULL]) for found in seeds])
    everything = Asked(0, 0, stratified=False).spent(PARENTS + 1, pool)
    for name in seeds[0]:
        each = [_values(found[name]) for found in seeds]
        cells = [name, "", _between(*of_mean(np.concatenate(each))), " ".join(f"{one.mean():.3f}" for one in each)]
        cells.append("" if name == FULL else _between(*of_difference(full, np.concatenate(each))))
        if asked := ways(pool).get(name):
            cells[1] = f"{everything / asked.spent(PARENTS + 1, pool):.1f}"
        seconds = [found[name]["seconds"] for found in seeds if "seconds" in found[name]]
        rows.append(f"| {' | '.join([*cells, f'{np.mean(seconds):.0f}' if seconds else ''])} |")
    return "\n".join(rows)


def _between(low: float, high: float) -> str:
    return f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pool", type=int, default=600, help="search items of each task")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    prepare(asked.folder / "models", Training(), print)
    print(table([searched(asked.folder, asked.pool, seed) for seed in asked.seeds], asked.pool))


if __name__ == "__main__":
    main()
