"""Small real networks for the tests of architectures: torch modules by hand, and tiny transformers models."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


def randomised(module, seed=0):
    """The module with all parameters and running statistics drawn anew: no symmetry hides in an initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.5
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return module.eval()


class MLP(nn.Module):
    def __init__(self, widths=(6, 9, 9, 7, 4), norm=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths[1:-1]) if norm else None

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k < len(self.layers) - 1:
                x = functional.relu(self.norms[k](x) if self.norms else x)
        return x


def vgg(batch_norm=True):
    layers, width = [], 3
    for new in (6, 8, 8):
        layers += [nn.Conv2d(width, new, 3, padding=1)] + ([nn.BatchNorm2d(new)] if batch_norm else []) + [nn.ReLU()]
        width = new
    net = nn.Sequential()
    net.features = nn.Sequential(*layers, nn.MaxPool2d(2))
    net.flatten = nn.Flatten()
    net.classifier = nn.Sequential(nn.Linear(8 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5))
    return net


class PadShortcut(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.planes = planes

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))


class BasicBlock(nn.Module):
    def __init__(self, width, planes, stride, *, option, name):
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        shortcut = nn.Sequential()
        if stride != 1 or width != planes:
            if option == "A":
                shortcut = PadShortcut(planes)
            else:
                shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        self.name = name
        setattr(self, name, shortcut)

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(out + getattr(self, self.name)(x))


class Bottleneck(nn.Module):
    def __init__(self, width, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = None
        if stride != 1 or width != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(out)))))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNetCifar(nn.Module):
    """Three stages of basic blocks, names of the usual CIFAR code; option A or B shortcuts."""

    def __init__(self, option="A", blocks=2, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        planes = [width, width, width * 2, width * 4]
        for stage in (1, 2, 3):
            layers = [
                BasicBlock(
                    planes[stage - 1] if block == 0 else planes[stage],
                    planes[stage],
                    2 if stage > 1 and block == 0 else 1,
                    option=option,
                    name="shortcut",
                )
                for block in range(blocks)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(planes[3], 5)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(functional.avg_pool2d(x, x.shape[3]).flatten(1))


class ResNetTorchvision(nn.Module):
    """Four stages with the names of torchvision; basic or bottleneck blocks."""

    def __init__(self, *, bottleneck=False, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        current = width
        for stage in (1, 2, 3, 4):
            planes, layers = width * 2 ** (stage - 1), []
            for block in range(2 if stage < 3 else 1):
                stride = 2 if stage > 1 and block == 0 else 1
                if bottleneck:
                    layers.append(Bottleneck(current, planes, stride))
                    current = planes * 4
                else:
                    layers.append(BasicBlock(current, planes, stride, option="B", name="downsample"))
                    current = planes
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(current, 5)

    def forward(self, x):
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class _TimmAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class _TimmBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _TimmAttention(dim, heads)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        self.ls1.gamma, self.ls2.gamma = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(x))))


class TimmViT(nn.Module):
    """A vision transformer with the names and the fused attention of timm, layer scale included."""

    def __init__(self, dim=12, heads=3, hidden=20, depth=2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList(_TimmBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


TINY = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
GQA = {**TINY, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 16}


def transformer(class_name, **changes):
    """A tiny transformers model with random weights, and the keyword arguments of a batch for it."""
    import transformers

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, class_name)
    settings = {**_settings(class_name), **changes}
    config = model_class.config_class(**settings)
    config.architectures = [class_name]
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(5)
    if class_name.startswith("ViT"):
        batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    else:
        batch = {"input_ids": torch.randint(1, 20, (2, 7), generator=generator)}
    return randomised(model_class(config)), batch


def _settings(class_name):
    if class_name.startswith("ViT"):
        return {**TINY, "image_size": 8, "patch_size": 4}
    if class_name.startswith("Bert"):
        return {**TINY, "max_position_embeddings": 10}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if class_name.startswith("GPT2"):
        return {"vocab_size": 20, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 10, **tokens}
    return {**GQA, **tokens}
