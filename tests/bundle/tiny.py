"""Tiny transformers models with random weights, experts around them, and bundles made of those."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import mergetool
from mergetool.bundle.build import build
from mergetool.bundle.options import Experts, HeadSource, Options, RouterOptions
from mergetool.bundle.store import FactorStore
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of, sha256_file
from mergetool.tensors.source import ModelSource
from mergetool.testing.classifiers import save_experts, tiny_config

WIDTH = 24


def tiny_kind(family: str) -> tuple[type[transformers.PreTrainedModel], transformers.PretrainedConfig]:
    """Class and config."""
    text = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    if family == "bert":
        return transformers.BertModel, transformers.BertConfig(**text, intermediate_size=48, max_position_embeddings=20)
    if family == "vit":
        small = {key: value for key, value in text.items() if key != "vocab_size"}
        return transformers.ViTModel, transformers.ViTConfig(**small, intermediate_size=48, image_size=8, patch_size=4)
    if family == "llama":
        config = transformers.LlamaConfig(**text, intermediate_size=48, num_key_value_heads=1, pad_token_id=0)
        return transformers.LlamaForCausalLM, config
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=20, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel, config
    config = transformers.T5Config(
        vocab_size=40,
        d_model=WIDTH,
        d_kv=12,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration, config


def tiny_model(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind, config = tiny_kind(family)
    return kind(config)


def tiny_network(family: str, weights: Mapping[str, Tensor]) -> transformers.PreTrainedModel:
    """With these weights, by the names that a checkpoint has."""
    kind, config = tiny_kind(family)
    state = {name: value.float().contiguous() for name, value in weights.items()}
    return kind.from_pretrained(None, config=config, state_dict=state).eval()


def tiny_inputs(family: str, num_samples: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(num_samples, 3, 8, 8, generator=generator)}
    ids = torch.randint(1, 40, (num_samples, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][::2, 4:] = 0  # every other sample is shorter
    if family == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 40, (num_samples, 3), generator=generator)
    return inputs


def write_models(folder: Path, model, tasks="abc", *, classes=(3, 5, 2), scale=0.3, rank=None) -> dict[str, Path]:
    """A base and one expert per task (every float tensor moved), with heads of unequal size."""
    model.save_pretrained(folder / "base")
    for place, task in enumerate(tasks):
        torch.manual_seed(10 + place)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        moved = {
            name: value + scale * _delta(value, rank) if value.is_floating_point() else value
            for name, value in before.items()
        }
        model.load_state_dict(moved)
        model.save_pretrained(folder / task)
        model.load_state_dict(before)
        head = {"weight": torch.randn(classes[place], WIDTH), "bias": torch.randn(classes[place])}
        save_file(head, folder / f"{task}.head.safetensors")
    return {name: folder / name for name in ("base", *tasks)}


def _delta(value: Tensor, rank: int | None) -> Tensor:
    """A random change with singular values i^-0.7, the size of the initialisation."""
    if value.ndim != 2:
        return 0.2 * torch.randn_like(value)
    size = min(value.shape)
    u, v = torch.linalg.qr(torch.randn(value.shape[0], size))[0], torch.linalg.qr(torch.randn(value.shape[1], size))[0]
    s = torch.arange(1, size + 1) ** -0.7
    if rank is not None:
        s[rank:] = 0
    return (u * s) @ v.mT


@dataclass
class FileExperts(Experts):
    """Experts as files, without the engine."""

    paths: dict[str, Path]
    heads: dict[str, HeadSource] = field(default_factory=dict)

    def __post_init__(self):
        self.names = tuple(name for name in self.paths if name != "base")
        self.sources: dict[str, ModelSource] = {name: open_model(path) for name, path in self.paths.items()}
        base = self.sources["base"]
        floats = [name for name, spec in base.specs.items() if spec.dtype.is_float]
        self.shapes = {name: base.specs[name].shape for name in sorted(floats, key=base.position)}

    def read(self, model: str, name: str) -> Tensor:
        spec = self.sources[model].specs[name]
        stored = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        self.sources[model].read_bytes(name, 0, bytes_of(stored.reshape(-1)))
        return stored.to(torch.float32, copy=True)

    def digests(self, model: str) -> dict[str, str]:
        return {stamp.path.name: sha256_file(stamp.path) for stamp in self.sources[model].files}


# The paper's norm and mode: random inputs of random models then choose different groups of tasks.
ROUTER = RouterOptions(
    layers="auto",
    features="base",
    pool="mean",
    norm="l2",
    mode="topk",
    threshold=0.2,
    top_k=3,
    temperature=1.0,
    redundancy=0.3,
)
OPTIONS = Options(
    kind="mass",
    rank="auto",
    filter="fusionbench",
    conv="matricize",
    dtype="float32",
    size=None,
    base="copy",
    router=ROUTER,
)


def make_bundle(folder: Path, family: str, *, options=OPTIONS, heads=None, tasks="abc", **models) -> Path:
    """A bundle of a tiny model of this family; a copy where it was made before."""
    asked = family, options, family in ("bert", "vit") if heads is None else heads, tasks
    if options.base != "copy":
        return _make(folder, *asked, **models)
    shutil.copytree(_made(*asked, **models).name, folder, dirs_exist_ok=True)
    return folder / "bundle"


@cache
def _made(*asked, **models) -> tempfile.TemporaryDirectory:
    place = tempfile.TemporaryDirectory()
    _make(Path(place.name), *asked, **models)
    return place


def _make(folder: Path, family: str, options: Options, heads: bool, tasks: str, **models) -> Path:
    paths = write_models(folder / "models", tiny_model(family), tasks, **models)
    pool = "cls" if family == "vit" else "mean"
    sources = {t: HeadSource(folder / "models" / f"{t}.head.safetensors", pool) for t in tasks} if heads else {}
    out = folder / "bundle"
    out.mkdir()
    build(FileExperts(paths, sources), out, FactorStore(folder / "store"), options)
    return out


# Text

TEXTS = ["w2", "w7 w9 w11 w13", "w21", "w20 w21 w22 w23 w24 w25"]


def save_tokenizer(folder):
    """Words w0 to w37, padded with 1."""
    vocabulary = {word: place for place, word in enumerate(["[UNK]", "[PAD]", *(f"w{index}" for index in range(38))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


def make_text_bundle(folder: Path, **router) -> Path:
    """Two classifiers of text, each of which answers some of TEXTS, on one base that has a tokenizer."""
    kind = transformers.BertForSequenceClassification
    paths = save_experts(folder, kind, tiny_config(kind), transformers.BertModel)
    save_tokenizer(paths["base"])
    recipe = {
        "base": str(paths["base"]),
        "models": {task: str(paths[task]) for task in "ab"},
        "merge": {"method": "mass", "router": {"threshold": 0.45, **router}},
    }
    return mergetool.run(recipe, output=folder / "out").path
