"""A small vision transformer that reads digits shown in five ways a little, and a fine-tune that reads each way well.

scikit-learn's digits, 8 x 8, patches of 2 x 2. Everything is drawn from seeds; what is there already is not made again.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from scripts.studies.c2m3.networks import digits

PRETRAIN, FINETUNE, BATCH = 400, 250, 32
_ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(5))


def _shuffled(images: Tensor) -> Tensor:
    """The patches in another order."""
    patches = nn.functional.unfold(images, 2, stride=2)[:, :, _ORDER]
    return nn.functional.fold(patches, (8, 8), 2, stride=2)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "turned": lambda images: images.rot90(1, (2, 3)),
    "negative": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(3),
    "shuffled": _shuffled,
}


def prepare(folder: Path) -> None:
    """`folder/base`, and a folder with encoder and head for every way."""
    images, labels = digits(0).train
    if not (folder / "base" / "config.json").exists():
        torch.manual_seed(0)
        shown = torch.cat([show(images) for show in WAYS.values()])
        model = ViTModel(_config(), add_pooling_layer=False)
        _train(model, shown, labels.repeat(len(WAYS)), PRETRAIN, 2e-3, folder / "base")
    for way, show in WAYS.items():
        if not (folder / way / "head.safetensors").exists():
            torch.manual_seed(1)
            base = ViTModel.from_pretrained(folder / "base", add_pooling_layer=False)
            _train(base, show(images), labels, FINETUNE, 5e-4, folder / way)


@torch.inference_mode()
def right(way: str, encoder: ViTModel, expert: Path) -> Tensor:
    """Whether the expert's head on top of the encoder tells each digit."""
    head = load_file(expert / "head.safetensors")
    images, labels = digits(0).test
    return nn.functional.linear(_features(encoder.eval(), WAYS[way](images)), **head).argmax(1) == labels


def _train(encoder: ViTModel, images: Tensor, labels: Tensor, steps: int, rate: float, folder: Path) -> None:
    head = nn.Linear(encoder.config.hidden_size, int(labels.max()) + 1)
    groups = [{"params": encoder.parameters(), "lr": rate}, {"params": head.parameters(), "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, 5e-3], total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(2)
    encoder.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(head(_features(encoder, images[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{folder.name}: loss {loss.item():.3f}", file=sys.stderr)
    encoder.eval().save_pretrained(folder)
    save_file({name: value.detach() for name, value in head.named_parameters()}, folder / "head.safetensors")


def _features(encoder: ViTModel, images: Tensor) -> Tensor:
    """Mean of the last layer over the patches."""
    return encoder(pixel_values=images).last_hidden_state[:, 1:].mean(1)


def _config() -> ViTConfig:
    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
