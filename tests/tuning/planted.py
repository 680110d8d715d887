"""Tiny language models whose answers are planted: merges of them have known scores, without any training.

A word is a prompt and `yes` or `no` the answer. The hidden states of all words are linearly independent, so an output
head can be solved for that gives every word any logits. A model's *margins* are how much it prefers the right answer:
in a merge of task vectors with weights w the margin of word i is `base_i + sum_k w_k (model_ki - base_i)`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 160
RIGHT, WRONG = "yes", "no"


def words(count):
    return [f"w{index}" for index in range(count)]


def write_tokenizer(folder: Path, count: int):
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", RIGHT, WRONG, *words(count)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(folder)
    return made


def llama(count: int, *, width: int = WIDTH, layers: int = 2):
    """A random model of so many words, the same every time."""
    assert count <= width
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=count + 4,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def towards(model, count: int) -> torch.Tensor:
    """What leads from the logits wanted of all words to a row of the head that gives them."""
    return torch.linalg.pinv(model.model(torch.arange(4, count + 4)[:, None]).last_hidden_state[:, 0].double())


@torch.no_grad()
def answer(model, solve: torch.Tensor, gold: np.ndarray, margin: np.ndarray) -> None:
    """Have the head prefer the right answer to each word by its margin; `solve` is `towards` of the model."""
    row = (solve @ torch.as_tensor(np.where(gold == 0, 1.0, -1.0) * margin / 2)).float()
    model.lm_head.weight.zero_()
    model.lm_head.weight[2], model.lm_head.weight[3] = row, -row


def write_models(
    folder: Path, margins: dict[str, np.ndarray], gold: np.ndarray, dtype=torch.float32
) -> dict[str, Path]:
    """A model for each array of margins (one number a word), and the tokenizer with each."""
    count = len(gold)
    model = llama(count)
    solve = towards(model, count)
    paths = {}
    for name, margin in margins.items():
        answer(model, solve, gold, margin)
        paths[name] = folder / name
        model.to(dtype).save_pretrained(paths[name])
        model.float()
        write_tokenizer(paths[name], count)
    return paths


def write_task(folder: Path, name: str, items, gold: np.ndarray, *, kind="multiple_choice") -> None:
    """A task over the words with these numbers, as YAML and JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"w{item}", "choices": [RIGHT, WRONG], "label": int(gold[item])} for item in items]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    free = kind == "generate_until"
    answer = (
        'doc_to_target: "{{choices[label]}}"\n'
        "generation_kwargs: {until: ['<eos>'], do_sample: false, max_gen_toks: 1}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        if free
        else "doc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},"
        " {metric: acc_norm, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
        f'test_split: test\noutput_type: {kind}\ndoc_to_text: "{{{{question}}}}"\nnum_fewshot: 0\n{answer}'
    )


class World:
    """A base that is bad at everything, two parents that are good at one half of the words each, a task for each half.

    No parent and no uniform average is the best merge: a parent's gain must be about doubled.
    """

    names = ("left", "right")
    tasks = ("lefts", "rights")

    def __init__(self, count: int = 120, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.gold = rng.integers(0, 2, count)
        self.half = np.arange(count) < count // 2
        self.margins = {"base": -rng.uniform(0.2, 2.0, count)}
        for name, mine in zip(self.names, (self.half, ~self.half), strict=True):
            gain = np.where(mine, rng.uniform(1.0, 3.0, count), -rng.uniform(0.0, 1.0, count))
            self.margins[name] = self.margins["base"] + gain

    def correct(self, weights) -> np.ndarray:
        """Which words a merge of task vectors with these weights gets right."""
        base = self.margins["base"]
        gains = sum(w * (self.margins[name] - base) for w, name in zip(weights, self.names, strict=True))
        return base + gains > 0

    def write(self, folder: Path, names=names, tasks=tasks) -> dict[str, str]:
        """Write `folder/models/*` and `folder/tasks`, under these names. Returns the models' paths."""
        margins = {"base": self.margins["base"]}
        margins |= {name: self.margins[own] for name, own in zip(names, self.names, strict=True)}
        paths = write_models(folder / "models", margins, self.gold)
        for task, half in zip(tasks, (self.half, ~self.half), strict=True):
            write_task(folder / "tasks", task, np.flatnonzero(half), self.gold)
        return {name: str(path) for name, path in paths.items()}
