"""Peak memory of what is measured layer by layer, on a model with layers of real size.

    python scripts/bench_by_layer.py FOLDER        in a new folder with some 10 GB of room

A Llama of 3 layers of 4096 x 11008 in bfloat16 (1.3 GB; weights of zeros, which the disk does not hold), 4 rows of
16 tokens; each statistic in a process of its own, which tells its peak and that of a process that measures nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 3, "num_attention_heads": 32}
ROWS, TOKENS, VOCABULARY = 4, 16, 8192


def write(folder: Path) -> None:
    """The model, its weights as holes of a file, and rows of ids."""
    import torch
    import transformers

    from mergetool.tensors.dtypes import of_torch
    from mergetool.tensors.header import TensorSpec, lay_out

    config = transformers.LlamaConfig(**SIZES, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    named = model.state_dict().items()
    prefix, header = lay_out([TensorSpec(n, of_torch(torch.bfloat16), tuple(v.shape)) for n, v in named], {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(prefix)
        file.truncate(header.file_size)
    rows = ({"text": [(row * TOKENS + place) % VOCABULARY for place in range(TOKENS)]} for row in range(ROWS))
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def layer_bytes() -> int:
    """Bytes of one layer in float32, in which it computes."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    return 4 * (4 * width * width + 3 * width * inner + 2 * width)


def measure(folder: Path, statistic: str) -> None:
    """Measure in this process, and print its peak."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import mergetool

    if statistic != "nothing":
        memory = {} if statistic == "whole" else {"memory": 1}
        name = "activation" if statistic == "whole" else statistic
        mergetool.measure(folder, name, folder / "rows.jsonl", cache=folder / "cache" / statistic, **memory)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(folder, sys.argv[2])
        return
    folder.mkdir(parents=True)
    write(folder)
    print(f"a layer: {layer_bytes() / 1e9:.2f} GB in float32, {len(range(SIZES['num_hidden_layers']))} of them")
    for statistic in ("nothing", "activation", "loss", "gram", "fisher", "gradient"):
        found = subprocess.run([sys.executable, __file__, str(folder), statistic], capture_output=True, text=True)
        told = found.stdout.strip() or found.stderr
        print(f"{statistic:12} {int(told) / 1e9:.2f} GB" if told.isdigit() else told, flush=True)


if __name__ == "__main__":
    main()
