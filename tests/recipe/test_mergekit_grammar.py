"""Recipes that mergekit takes, made at random: each converts, what is written is valid, and it means the same."""

import random

import pytest
import yaml

from mergetool.methods import registry
from mergetool.recipe import load_recipe
from mergetool.recipe.load import imported_text
from mergetool.recipe.mergekit.counterparts import METHODS
from mergetool.recipe.mergekit.parameters import REQUIRED
from tests.files import LONG

TWO = {"slerp": "base", "nuslerp": "free", "nearswap": "other", "arcee_fusion": "other"}
"""Methods that take two models, and what the base is to them."""
NEEDS = [name for name, target in METHODS.items() if target.base == "ancestor" or name == "slerp"]
NAMES = (
    "org/a",
    "org/b@v1",
    "./c d",
    "org/1e3",
    "x/base",
    "y/union",
    "{model: {path: org/f}}",
    "org/g+org/lora",
    "'no'",
)
FILTERS = ("self_attn", "mlp", "layernorm", "lm_head", "embed_tokens", "model.layers.1.")
NUMBERS = {
    "density": (0.2, 0.5, 1, "0.3", 0.7, 1.0),
    "epsilon": (0.01, 0.15),
    "gamma": (0, 0.01),
    "t": (0, 0.25, "0.5", 1),
}
NUMBERS |= {"max_iter": (3, 10), "tol": ("1e-5", 1e-7), "eps": (1e-8,), "select_topk": (0.1, 1.0, "0.5")}
OTHERS = (0.2, 1, 0.75, "0.5", True, 2e-1)
SWITCHES = (True, False, "yes", "off", 1, 0.0)


class Maker:
    """One random recipe."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.method = self.random.choice(sorted(METHODS))
        self.target = METHODS[self.method]
        self.filters = self.random.sample(FILTERS, 2)

    def pick(self, values):
        return self.random.choice(list(values))

    def happens(self, chance=0.5):
        return self.random.random() < chance

    def number(self, key):
        parameter = self.target.parameters[key]
        if parameter.kind is bool:
            return self.pick(SWITCHES)
        return self.pick(NUMBERS.get(key, OTHERS))

    def nothing_is_kept(self):
        return not self.method.startswith("della") and self.happens(0.1)

    def value(self, key):
        """A number, or a gradient of such."""
        parameter = self.target.parameters[key]
        along_depth = parameter.field in registry()[self.target.method].schedulables()
        if not along_depth or self.happens(0.7):
            return 0 if key == "density" and self.nothing_is_kept() else self.number(key)
        return [self.number(key) for _ in range(self.pick((1, 2, 5)))]

    def setting(self, key):
        """A value, or one for each filter."""
        if self.happens(0.6):
            return self.value(key)
        lines = [{"filter": text, "value": self.value(key)} for text in self.random.sample(self.filters, 2)]
        return [*lines, {"value": self.value(key)}]

    def parameters(self, *, own):
        """Some of the parameters that may stand here, and sometimes one that has no effect."""
        known = [key for key, each in self.target.parameters.items() if own is False or each.per_model]
        found = {key: self.setting(key) for key in known if self.happens(0.3)}
        found |= {"nonsense": 1} if self.happens(0.1) else {}
        return {"parameters": found} if found else {}

    def recipe(self):
        count = 2 if self.method in TWO else 1 if self.method == "passthrough" else self.pick((3, 4))
        names = [yaml.safe_load(name) for name in self.random.sample(NAMES, count)]
        out = {"merge_method": self.method}
        if self.method in NEEDS or (self.method in ("linear", "karcher") and self.happens(0.3)):
            out["base_model"] = names[0]
        layers = self.pick((None, 1, 8, 32))
        if layers is None:
            out["models"] = [{"model": name, **self.parameters(own=True)} for name in names]
        else:
            out["slices"] = [
                {"sources": [self.source(name, start, layers) for name in names], **self.parameters(own=False)}
                for start in range(self.pick((1, 2, 3)))
            ]
        required = {key for key, each in self.target.parameters.items() if each.default is REQUIRED}
        out["parameters"] = {**self.parameters(own=False).get("parameters", {}), **{k: self.value(k) for k in required}}
        return out | self.others(names)

    def source(self, name, start, layers):
        return {"model": name, "layer_range": [start, start + layers], **self.parameters(own=True)}

    def others(self, names):
        out = {}
        if self.happens():
            out["dtype"] = self.pick(("bfloat16", "float16", "float32", "torch.float32"))
        if self.happens(0.3):
            out["tokenizer_source"] = self.pick(("base", "union", names[0]))
        elif self.happens(0.3):
            out["tokenizer"] = {"source": "union", "tokens": {"1e5": {"source": names[0], "force": True}}}
        if self.happens(0.2):
            out["chat_template"] = self.pick(("auto", "chatml"))
        if self.happens(0.2):
            out["normalise"] = True
        return out


@pytest.mark.parametrize("batch", range(4 if LONG else 2))
def test_what_mergekit_takes_is_written_so_that_it_is_taken(batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(batch * 40, (batch + 1) * 40):
        recipe = Maker(seed).recipe()
        (tmp_path / "theirs.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        (tmp_path / "ours.yaml").write_text(imported_text(tmp_path / "theirs.yml", tmp_path)[0])
        as_it_is, written = load_recipe("theirs.yml"), load_recipe("ours.yaml")
        for part in ("models", "base", "method", "overrides", "layout", "layout_overrides", "output", "tokenizer"):
            assert getattr(written, part) == getattr(as_it_is, part), (seed, part)
