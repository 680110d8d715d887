"""Small real-shaped checkpoints, the same to the bit with every numpy, and samples of their tensors.

Only `RandomState.random_sample` is drawn from: its stream is frozen, and sums of its draws in a fixed order are exact
IEEE arithmetic. So the reference numbers of a peer can be committed without the models they were made from.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

NUM_LAYERS = 3
HIDDEN, HEAD, INNER, VOCAB = 32, 8, 48, 40  # 4 query heads, 2 key and value heads
DELTA_SD = {"base": 0.0, "a": 1e-3, "b": 1e-3, "c": 1e-2, "d": 1e-2}
SAMPLES = 96  # elements kept of each tensor
SEED = 3  # one with which no two magnitudes at a threshold of the cases are equal, and no vote of signs ends even

CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "edges": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
}
MORE = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())
CONFIGS |= {name: family["config"] for name, family in MORE.items()}


def write_families(folder: Path) -> None:
    """Write `folder/<family>/<model>/` for every family: base and four fine-tunes, `edges` base and two."""
    for family in CONFIGS:
        for model in ("base", "a", "b") if family == "edges" else DELTA_SD:
            _write_checkpoint(folder / family / model, family, tensors(family, model))


def tensors(family: str, model: str) -> dict[str, np.ndarray]:
    """One model's tensors: a shared base, plus deltas of the model's standard deviation."""
    out = {}
    for name, shape in shapes(family).items():
        scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
        base = scale * noise(f"{family}/{name}", shape) + (1.0 if "norm" in name else 0.0)
        delta = DELTA_SD[model] * noise(f"{family}/{model}/{name}", shape)
        out[name] = (base + delta).astype(np.float32)
    return out | (_edges(model) if family == "edges" else {})


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes; qwen2 has biases and no head of its own."""
    if family in MORE:
        return _shapes_of(**MORE[family])
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}."
        out[layer + "input_layernorm.weight"] = (HIDDEN,)
        for projection, rows in (("q", HIDDEN), ("k", 2 * HEAD), ("v", 2 * HEAD)):
            out[layer + f"self_attn.{projection}_proj.weight"] = (rows, HIDDEN)
            if family == "qwen2":
                out[layer + f"self_attn.{projection}_proj.bias"] = (rows,)
        out[layer + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        out[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        out[layer + "mlp.gate_proj.weight"] = (INNER, HIDDEN)
        out[layer + "mlp.up_proj.weight"] = (INNER, HIDDEN)
        out[layer + "mlp.down_proj.weight"] = (HIDDEN, INNER)
    out["model.norm.weight"] = (HIDDEN,)
    if family != "qwen2":
        out["lm_head.weight"] = (VOCAB, HIDDEN)
    return out


def _shapes_of(
    config: dict[str, object],
    layer: dict[str, list[int]],
    prefix: str = "model.layers.",
    before: dict[str, list[int]] | None = None,
    after: dict[str, list[int]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Those of a family of families.yaml."""
    head = {} if config.get("tie_word_embeddings", True) else {"lm_head.weight": [VOCAB, HIDDEN]}
    listed = {**(before or {"model.embed_tokens.weight": [VOCAB, HIDDEN]})}
    for i in range(NUM_LAYERS):
        listed |= {f"{prefix}{i}.{name}": shape for name, shape in layer.items()}
    listed |= after or {"model.norm.weight": [HIDDEN], **head}
    return {name: tuple(shape) for name, shape in listed.items()}


def noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped noise of mean 0 and variance 1 (a sum of four uniform draws), seeded by a text."""
    draws = np.random.RandomState(zlib.crc32(f"{SEED}/{key}".encode()))
    total = np.zeros(shape)
    for _ in range(4):
        total = total + draws.random_sample(shape)
    return (total - 2.0) * 3**0.5


def sample(name: str, tensor: np.ndarray) -> np.ndarray:
    """The elements of a tensor that are committed: all of a small one, else `SAMPLES` at seeded places."""
    flat = tensor.reshape(-1)
    if flat.size <= SAMPLES:
        return flat
    order = np.random.RandomState(zlib.crc32(name.encode())).random_sample(flat.size).argsort(kind="stable")
    return flat[np.sort(order[:SAMPLES])]


def summary(tensor: np.ndarray) -> np.ndarray:
    """Sum and Euclidean norm over all elements, in float64: what the samples did not see, these did."""
    flat = tensor.reshape(-1).astype(np.float64)
    return np.array([flat.sum(), np.sqrt((flat * flat).sum())])


def _edges(model: str) -> dict[str, np.ndarray]:
    """Pairs (base, other) at the corners of slerp and of the sign vote; the other tensors are ordinary."""
    if model == "base":
        return {_edge("self_attn.v_proj"): np.zeros((2 * HEAD, HIDDEN), np.float32)} | _opposed(model)
    base = tensors("edges", "base")
    out = {
        _edge("self_attn.q_proj"): _at_cosine(base, "self_attn.q_proj", 0.99955),  # just inside slerp's lerp branch
        _edge("self_attn.k_proj"): _at_cosine(base, "self_attn.k_proj", 0.99945),  # just outside
        _edge("self_attn.o_proj"): -base[_edge("self_attn.o_proj")],
        _edge("mlp.gate_proj"): base[_edge("mlp.gate_proj")],
        _edge("mlp.up_proj"): _at_cosine(base, "mlp.up_proj", 0.0),
        _edge("mlp.down_proj"): -2 * base[_edge("mlp.down_proj")],
    }
    return out | _opposed(model)


def _edge(module: str) -> str:
    return f"model.layers.0.{module}.weight"


def _at_cosine(base: dict[str, np.ndarray], module: str, cosine: float) -> np.ndarray:
    """A tensor 1.3 times as long as the base's, at the given cosine to it."""
    u = base[_edge(module)].astype(np.float64)
    u /= np.linalg.norm(u)
    v = noise(f"edges/other/{module}", u.shape)
    v -= (u * v).sum() * u
    v /= np.linalg.norm(v)
    length = 1.3 * np.linalg.norm(base[_edge(module)].astype(np.float64))
    return (length * (cosine * u + (1 - cosine**2) ** 0.5 * v)).astype(np.float32)


def _opposed(model: str) -> dict[str, np.ndarray]:
    """Models a and b disagree exactly: equal magnitudes, opposite signs, on a grid where float32 is exact."""
    name, shape = "model.layers.1.mlp.up_proj.weight", (INNER, HIDDEN)
    base = np.round(noise("edges/opposed/base", shape) * 2**8) / 2**12
    delta = np.round(noise("edges/opposed/delta", shape) * 2**8) / 2**16
    return {name: (base + {"base": 0, "a": 1, "b": -1}[model] * delta).astype(np.float32)}


def _write_checkpoint(folder: Path, family: str, named: dict[str, np.ndarray]) -> None:
    """Config and weights; llama in three shards, the others in one file."""
    folder.mkdir(parents=True)
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "torch_dtype": "float32",
    }
    config = CONFIGS[family] | ({"vocab_size": VOCAB} if family == "gpt2" else common)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if family != "llama":
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(np.array_split(np.array(list(named)), 3), start=1):
        file = f"model-{i:05}-of-00003.safetensors"
        save_file({name: named[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard.tolist(), file)
    total = sum(t.nbytes for t in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
