"""Where the recipes' `scale` comes from: validation accuracy over a grid, the same for each method.

Run `python -m scripts.demo.scales` after scripts/quickstart. The test split is not read; all other
settings come from the recipes.
"""

from safetensors.torch import load_file

import mergetool

from . import tasks, train
from .pipeline import DEMO, RECIPES

GRID = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def main() -> None:
    train.quiet(num_threads=2)
    base = load_file(DEMO / "base" / "model.safetensors")
    folders = {task: DEMO / "experts" / task for task in tasks.NAMES}
    experts = {task: load_file(folder / "model.safetensors") for task, folder in folders.items()}
    encoder = train.load_encoder(DEMO / "base")
    tokenizer = train.PreTrainedTokenizerFast.from_pretrained(DEMO / "base")
    held_out = {task: tasks.load(DEMO / "data" / f"{task}.json").splits["validation"] for task in folders}
    batches = {task: train.make_batches(tokenizer, pairs, batch_size=64) for task, pairs in held_out.items()}
    for name in ("task-arithmetic", "ties", "tsv-merge"):
        section = mergetool.load_recipe(RECIPES / f"{name}.yaml").document["merge"]
        for scale in GRID:
            encoder.load_state_dict(mergetool.merge_state_dicts({**section, "scale": scale}, experts, base))
            scores = [train.accuracy(encoder, folder, batches[task]) for task, folder in folders.items()]
            print(f"{name:16s} scale {scale:3.1f}  mean validation accuracy {100 * sum(scores) / len(scores):.1f}")


if __name__ == "__main__":
    main()
