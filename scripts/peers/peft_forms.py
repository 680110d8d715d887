#!/usr/bin/env python3
"""Write adapters as a version of PEFT saves them, what they answer, and the weights that it merges them into.

python -m venv old; old/bin/pip install peft==0.8.2 transformers==4.38.2 "numpy<2"     # or 0.10.0, 0.12.0
old/bin/python scripts/peers/peft_forms.py        # and so for 0.15.2 and 0.18.0, with the transformers of their time

Into tests/peers/peft/VERSION.safetensors: for every case `CASE/base/*`, `CASE/adapter/*`, `CASE/answers/*`,
`CASE/merged/*`; the cases' adapter_config.json are its metadata.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, __version__, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"


class Net(nn.Module):
    """A layer of every kind that LoRA can be hung at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.query = nn.Linear(4, 6)
        self.value = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(6, 2)


CASES = {
    "plain": {"target_modules": ["query", "conv", "embed_tokens"], "r": 2, "lora_alpha": 3},
    "pickled": {"target_modules": "query|value", "r": 2},
    "patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 3},
        "alpha_pattern": {"query": 5},
        "use_rslora": True,
        "r": 2,
    },
    "all biases": {"target_modules": ["query"], "bias": "all", "r": 2},
    "own biases": {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["head"], "r": 2},
    "dora": {"target_modules": ["query", "value"], "use_dora": True, "r": 2},
    "dora of all": {"target_modules": ["query", "conv", "embed_tokens"], "use_dora": True, "r": 2},
    "bias of B": {"target_modules": ["query", "conv"], "lora_bias": True, "r": 2},
    "parameters": {"target_modules": [], "target_parameters": ["query.weight"], "r": 2},
    "rows": {"target_modules": ["query"], "trainable_token_indices": {"embed_tokens": [1, 5]}, "r": 2},
}


def answers(net: nn.Module) -> dict[str, torch.Tensor]:
    """What every layer makes of the same inputs."""
    vectors = torch.linspace(-1, 1, 20).view(5, 4)
    inputs = {
        "embed_tokens": torch.arange(7),
        "conv": torch.linspace(-1, 1, 48).view(1, 3, 4, 4),
        "query": vectors,
        "value": vectors,
        "head": torch.linspace(-1, 1, 30).view(5, 6),
    }
    with torch.no_grad():
        return {name: getattr(net, name)(each) for name, each in inputs.items()}


def adapted(base: Net, settings: dict[str, object]) -> nn.Module | None:
    """A trained model; None where this version has no such adapters."""
    if not settings.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}:
        return None
    try:
        model = get_peft_model(base, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        print(settings, error)
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], str] | None:
    """All tensors of a case, and its adapter_config.json."""
    torch.manual_seed(1)
    base = Net()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base, CASES[case])
    if model is None:
        return None
    answered = answers(model.eval().base_model.model)
    model.save_pretrained(folder, safe_serialization=case != "pickled")
    again = Net()
    again.load_state_dict(start)
    merged = PeftModel.from_pretrained(again, folder).merge_and_unload().state_dict()
    pickled = folder / "adapter_model.bin"
    own = torch.load(pickled) if pickled.is_file() else load_file(folder / "adapter_model.safetensors")
    groups = {"base": start, "adapter": own, "answers": answered, "merged": merged}
    tensors = {f"{case}/{group}/{name}": each for group, named in groups.items() for name, each in named.items()}
    return tensors, (folder / "adapter_config.json").read_text()


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = write(case, Path(name))
        if written is not None:
            tensors |= {key: tensor.clone() for key, tensor in written[0].items()}
            configs[case] = written[1]
    save_file(tensors, PEERS / "peft" / f"{__version__}.safetensors", metadata=configs)
    print(__version__, ", ".join(configs))


if __name__ == "__main__":
    main()
