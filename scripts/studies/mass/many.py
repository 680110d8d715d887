"""Many experts: what a bundle of them takes, in bytes and time, and what one more costs.

    python -m scripts.studies.mass.many FOLDER [--tasks 8 12 20 100] [--rank 4] [--steps 0] [--encoder]

A tiny classifier of texts (BERT, 4 layers, 128 wide; with `--encoder` 6 layers, 384 wide, as sentence encoders are, 22M
parameters), experts around it, bundles of so many of them; a table on stdout.
With `--steps`, experts are trained, each to tell which of two kinds of its own words a text has more of; without, their
weights are moved at random, and only sizes and times mean anything. Times are process time of one thread.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import mergetool
from mergetool.bundle.verify import facts_about_bundle

WORDS, LENGTH, BATCH = 4000, 24, 64
HEADS = ("tasks", "factors, MB", "of the base", "make, s", "add one, s", "open, s", "route 64, ms", "answer 64, ms")


def config(*, encoder: bool) -> transformers.BertConfig:
    width, layers, words = (384, 6, 30522) if encoder else (128, 4, WORDS)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 32, "num_labels": 2}
    return transformers.BertConfig(vocab_size=words, max_position_embeddings=LENGTH, **sizes, **heads)


def texts_of(task: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts of 30 words that are this task's own, and which half of these each has more of."""
    first = 10 + 30 * task
    labels = torch.randint(2, (count,), generator=generator)
    lean = torch.rand(count, LENGTH, generator=generator) < 0.75
    half = torch.where(lean, labels[:, None], 1 - labels[:, None])
    return first + 15 * half + torch.randint(15, (count, LENGTH), generator=generator), labels


def make_expert(base: nn.Module, task: int, steps: int) -> nn.Module:
    torch.manual_seed(task)
    expert = copy.deepcopy(base)
    if not steps:
        with torch.no_grad():
            for value in expert.parameters():
                value.add_(0.02 * torch.randn_like(value))
        return expert
    generator = torch.Generator().manual_seed(task)
    optimizer = torch.optim.AdamW(expert.parameters(), 5e-4)
    for _ in range(steps):
        ids, labels = texts_of(task, 32, generator)
        expert(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return expert


def prepare(folder: Path, count: int, steps: int, *, encoder: bool) -> dict[str, Path]:
    """Base and experts, made unless they are there."""
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config(encoder=encoder))
    if not (folder / "base").exists():
        base.save_pretrained(folder / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
    for task in range(count):
        if not (folder / f"t{task}").exists():
            make_expert(base, task, steps).save_pretrained(folder / f"t{task}")
    return {name: folder / name for name in ("base", *(f"t{task}" for task in range(count)))}


def clocked(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of process time, the least of several."""
    least = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        run()
        least = min(least, time.process_time() - started)
    return least


def measured(paths: dict[str, Path], count: int, merge: dict[str, object], folder: Path) -> Sequence[object]:
    tasks = [f"t{task}" for task in range(count)]

    def made(names: Sequence[str], output: Path) -> Path:
        models = {name: str(paths[name]) for name in names}
        recipe = {"base": str(paths["base"]), "models": models, "merge": {"method": "mass", **merge}}
        return mergetool.run(recipe, output=output, workers=1, overwrite=True).path

    bundle = folder / f"bundle{count}"
    make = clocked(lambda: made(tasks, bundle))
    made(tasks[:-1], folder / "without")
    add = clocked(lambda: mergetool.change_bundle(folder / "without", {tasks[-1]: str(paths[tasks[-1]])}, workers=1))
    opening = clocked(lambda: mergetool.load_bundle(bundle))
    model, facts = mergetool.load_bundle(bundle), facts_about_bundle(bundle)
    generator = torch.Generator().manual_seed(-count)
    chosen = torch.randint(count, (BATCH,), generator=generator).tolist()
    found = [texts_of(task, 1, generator) for task in chosen]
    ids, labels = torch.cat([ids for ids, _ in found]), torch.cat([labels for _, labels in found])
    answer = model(input_ids=ids)
    right = [task == f"t{number}" for task, number in zip(answer.task, chosen, strict=True)]
    strict = [
        ok and int(scores.argmax()) == label for ok, scores, label in zip(right, answer.logits, labels, strict=True)
    ]
    sys.stderr.write(f"{count}: right task {sum(right) / BATCH:.2f}, and class {sum(strict) / BATCH:.2f}\n")
    factors = sum(facts["factor_bytes"].values())
    times = (clocked(lambda: model.route(input_ids=ids), 3), clocked(lambda: model(input_ids=ids), 3))
    share = factors / facts["base_bytes"]
    return (
        count,
        f"{factors / 1e6:.1f}",
        f"{share:.2f}",
        f"{make:.1f}",
        f"{add:.1f}",
        f"{opening:.1f}",
        *(f"{1000 * each:.0f}" for each in times),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 12, 20, 100])
    parser.add_argument("--rank", type=int, help="directions of every expert (default: what the method keeps)")
    parser.add_argument("--steps", type=int, default=0, help="length of every fine-tune")
    parser.add_argument("--encoder", action="store_true", help="experts of 22M parameters")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    place = given.folder / f"{'encoder' if given.encoder else 'steps'}{given.steps}"
    paths = prepare(place, max(given.tasks), given.steps, encoder=given.encoder)
    merge = {} if given.rank is None else {"rank": given.rank, "size": 100.0}
    print("| " + " | ".join(HEADS) + " |\n|" + " --- |" * len(HEADS))
    for count in given.tasks:
        print("| " + " | ".join(map(str, measured(paths, count, merge, given.folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
