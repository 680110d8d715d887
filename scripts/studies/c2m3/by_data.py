"""Networks from different seeds matched by what they say to the same inputs, against matching by weights.

    python -m scripts.studies.c2m3.by_data OUT [--sets 2] [--models 2 3 5]

Digits MLPs of `python -m scripts.studies.c2m3 OUT`, trained where OUT has none; 500 training images without labels
decide. Prints test accuracy and processor seconds of one thread for each method, means over the sets.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import mergetool
from scripts.studies.c2m3.__main__ import CALIBRATION, Subject, trained
from scripts.studies.c2m3.networks import MLP, Training, digits, score

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
        "c2m3": {"method": "c2m3"},
        "c2m3, correlation": {"method": "c2m3", "match": said},
        "c2m3, product": {"method": "c2m3", "match": loud},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--models", type=int, nargs="+", default=[2, 5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, small, width = arguments.out.absolute(), digits(0), arguments.width
    out.mkdir(parents=True, exist_ok=True)
    save_file({"x": small.train[0][:CALIBRATION].contiguous()}, out / "inputs.safetensors")
    (out / f"build_{width}.py").write_text(NETWORK.format(width=width))
    subject = Subject("mlp", MLP, (small.pixels, width), small, Training(60), arguments.sets)
    sets = [trained(subject, 5 * k, out / f"mlp-{width}-{5 * k}.pt") for k in range(arguments.sets)]
    each = [score(subject.network(), state, small.test).accuracy for states in sets for state in states.values()]
    print(f"single networks: {sum(each) / len(each):.2f} %", flush=True)
    for count in arguments.models:
        for name, section in methods(out, width).items():
            right, started = 0.0, time.process_time()
            for states in sets:
                models = dict(list(states.items())[:count])
                about = {} if name == "average" else {"architecture": "mlp", "trust_code": True}
                merged = mergetool.merge_state_dicts(section, models, **about)
                right += score(subject.network(), merged, small.test).accuracy / len(sets)
            seconds = (time.process_time() - started) / len(sets)
            print(f"{count} models, {name:25s} {right:.2f} %  {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
