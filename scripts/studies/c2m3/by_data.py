"""Networks from different seeds matched by what they say to the same inputs, against matching by weights.

    python -m scripts.studies.c2m3.by_data OUT [--sets 2] [--models 2 3 5] [--split 1]

With --tasks: two fine-tunes of one base, one of which saw the digits 0 to 4 only, the other 5 to 9.

Digits MLPs of `python -m scripts.studies.c2m3 OUT`, trained where OUT has none; 500 training images without labels
decide. With --split they are of other seeds, tested on other images. Prints test accuracy and processor seconds of one
thread for each method, means over the sets.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import mergetool
from scripts.studies.c2m3.__main__ import CALIBRATION, State, Subject, trained
from scripts.studies.c2m3.networks import MLP, Data, Training, digits, score, train

NETWORK = "from scripts.studies.c2m3.networks import MLP\n\ndef build():\n    return MLP(64, {width})\n"


def methods(out: Path, width: int) -> dict[str, dict[str, object]]:
    data = {"data": str(out / "inputs.safetensors"), "network": f"{out}/build_{width}.py:build"}
    said = {"by": "activations", **data}
    loud = {**said, "compare": "product"}
    return {
        "average": {"method": "linear"},
        "git-rebasin": {"method": "git-rebasin"},
        "git-rebasin, correlation": {"method": "git-rebasin", "match": said},
        "git-rebasin, product": {"method": "git-rebasin", "match": loud},
        "merge-many": {"method": "merge-many"},
        "c2m3": {"method": "c2m3"},
        "c2m3, no releases": {"method": "c2m3", "align": {"releases": 0}},
        "c2m3, correlation": {"method": "c2m3", "match": said},
        "c2m3, product": {"method": "c2m3", "match": loud},
        "ot-fusion, weights": {"method": "ot-fusion"},
        "ot-fusion, smooth": {"method": "ot-fusion", "smoothing": 0.01},
        "ot-fusion, activations": {"method": "ot-fusion", "match": loud},
        "zipit, weights": {"method": "zipit"},
        "zipit, activations": {"method": "zipit", "match": said},
        "zipit, alpha 0.3": {"method": "zipit", "match": said, "alpha": 0.3},
        "zipit, none within": {"method": "zipit", "match": said, "within": 0.0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--tasks", action="store_true")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--models", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--split", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, small, width = arguments.out.absolute(), digits(arguments.split), arguments.width
    out.mkdir(parents=True, exist_ok=True)
    save_file({"x": small.train[0][:CALIBRATION].contiguous()}, out / "inputs.safetensors")
    (out / f"build_{width}.py").write_text(NETWORK.format(width=width))
    subject = Subject("mlp", MLP, (small.pixels, width), small, Training(60), arguments.sets)
    train_sets = tasks if arguments.tasks else trained
    seeds = [100 * arguments.split + 5 * k for k in range(arguments.sets)]
    sets = [train_sets(subject, seed, out / f"mlp-{width}-{seed}.pt") for seed in seeds]
    each = [score(subject.network(), state, small.test).accuracy for states in sets for state in states.values()]
    print(f"single networks: {sum(each) / len(each):.2f} %", flush=True)
    for count in [2] if arguments.tasks else arguments.models:
        for name, section in methods(out, width).items():
            right, seconds = measured(subject, section, [dict(list(states.items())[:count]) for states in sets])
            print(f"{count} models, {name:25s} {right:.2f} %  {seconds:.1f} s", flush=True)


def measured(subject: Subject, section: dict[str, object], sets: list[dict[str, State]]) -> tuple[float, float]:
    """Accuracy in percent, and seconds, means over the sets."""
    right, started = 0.0, time.process_time()
    for models in sets:
        about = {} if section["method"] == "linear" else {"architecture": "mlp", "trust_code": True}
        merged = mergetool.merge_state_dicts(section, models, **about)
        right += score(subject.network(), merged, subject.data.test).accuracy
    return right / len(sets), (time.process_time() - started) / len(sets)


def tasks(subject: Subject, seed: int, path: Path) -> dict[str, State]:
    """Two fine-tunes of the first network that is kept at `path`, each on half of the digits."""
    base = trained(subject, seed, path)["seed0"]
    images, labels = subject.data.train
    found = {}
    for name, mine in (("low", labels < 5), ("high", labels >= 5)):
        torch.manual_seed(seed)
        network = subject.network()
        network.load_state_dict(base)
        half = Data((images[mine], labels[mine]), subject.data.test)
        found[name] = train(network, half, replace(subject.training, epochs=10, rate=1e-3, decay=0.0), seed)
    return found


if __name__ == "__main__":
    main()
