"""The facts of an analysis, invented: as many models and layers as one likes, and any of the figures missing."""

from itertools import combinations

import numpy as np

ROLES = {
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (64, 64),
    "self_attn.v_proj.weight": (64, 64),
    "self_attn.o_proj.weight": (64, 64),
    "mlp.gate_proj.weight": (172, 64),
    "mlp.up_proj.weight": (172, 64),
    "mlp.down_proj.weight": (64, 172),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}
OUTSIDE = "outside the layers"
SIGNS = ("conflict", "conflict_by_chance", "cancelled", "survives_bfloat16", "error_bfloat16")
OF_MODELS = ("norm", "relative", "max", "share_changed", "kinship", "share_of_sum")
DENSITIES = (0.001, 0.01, 0.1, 0.2, 0.5, 1.0)


class Planted:
    """`empty`: every figure that may be missing is."""

    def __init__(self, models, layers=4, base="base", empty=False, seed=0):
        self.models, self.layers, self.base, self.empty = list(models), layers, base, empty
        self.rng = np.random.default_rng(seed)
        self.pairs = list(combinations(self.models, 2))

    def number(self, low=0.0, high=1.0):
        return None if self.empty else round(float(self.rng.uniform(low, high)), 6)

    def group(self):
        return {"parameters": 4096, "cosine": self.number(-0.3, 0.6), "kinship": self.number(0.95, 1)} | {
            name: self.number() for name in SIGNS
        }

    def of_model(self, model):
        return {"model": model} | {name: self.number() for name in OF_MODELS} | {"norm": self.number() or 0.0}

    def of_pair(self, a, b):
        figures = {"cosine": self.number(-1), "kinship": self.number(0.9, 1), "opposed": self.number()}
        return {"a": a, "b": b, "distance": self.number()} | figures

    def places(self):
        """Layer, depth and role of every tensor."""
        yield "model.embed_tokens.weight", OUTSIDE, None, "model.embed_tokens.weight", (100, 64)
        for place in range(self.layers):
            for role, shape in ROLES.items():
                yield f"model.layers.{place}.{role}", f"model.layers.{place}", place, role, shape
        yield "lm_head.weight", OUTSIDE, None, "lm_head.weight", (100, 64)

    def rows(self):
        found = [
            dict(zip(("tensor", "layer", "depth", "role", "shape"), place, strict=True)) for place in self.places()
        ]
        layers = {row["layer"]: {"layer": row["layer"], "depth": row["depth"]} for row in found}.values()
        roles = [{"role": role} for role in dict.fromkeys(row["role"] for row in found)]
        cells = {(row["layer"], row["role"]): {key: row[key] for key in ("layer", "depth", "role")} for row in found}
        matrices = [
            {key: row[key] for key in ("tensor", "layer", "depth", "role")}
            for row in found
            if len(row["shape"]) == 2 and row["depth"] is not None and not self.empty
        ]
        return {
            "models": [self.model(model) for model in self.models],
            "pairs": [self.of_pair(*pair) for pair in self.pairs],
            "layers": [row | self.group() | {"interference": self.number()} for row in layers],
            "roles": [row | self.group() | {"interference": self.number()} for row in roles],
            "cells": [row | self.group() for row in cells.values()] if self.pairs else [],
            "layers_by_model": [row | self.of_model(model) for row in layers for model in self.models],
            "roles_by_model": [row | self.of_model(model) for row in roles for model in self.models],
            "pairs_by_layer": [row | self.of_pair(*pair) for row in layers for pair in self.pairs],
            "pairs_by_role": [row | self.of_pair(*pair) for row in roles for pair in self.pairs],
            "tensors": [row | self.group() | self.state() for row in found],
            "tensors_by_model": [
                row | {"identical": self.empty} | self.of_model(model) for row in found for model in self.models
            ],
            "redundancy": [
                {"model": model, "density": each, "energy": self.number(each, 1), "mass": self.number(each, 1)}
                for model in self.models
                for each in DENSITIES
            ],
            "spectra": [row | self.spectrum(model) for row in matrices for model in self.models],
            "interference": [
                row | {"kept": 16, "interference": self.number(), "chance": 0.5, "total": 1.0} for row in matrices
            ],
            "alignment": [row | self.alignment(*pair) for row in matrices for pair in self.pairs],
            "settings": self.settings(),
            "missing": [] if self.empty else [{"tensor": "x", "models": self.models[:1], "why": "missing"}],
        }

    def state(self):
        return {"dtypes": ["BF16"], "state": "identical" if self.empty else "changed", "base_norm": 3.0}

    def model(self, model):
        ranks = {"effective_rank": self.number(1, 64), "stable_rank": self.number(1, 64), "edge": self.number(1, 5)}
        counts = {"identical": 9, "tensors": 39, "not_finite": 0, "dtypes": ["BF16"]}
        kinship = {"kinship_layers": self.number(), "kinship_tokens": self.number()}
        return self.of_model(model) | counts | ranks | kinship | {"share_of_norms": self.number()} | {
            "density_90": self.number()
        }  # fmt: skip

    def spectrum(self, model):
        leading = sorted(self.rng.uniform(0, 1, 15), reverse=True)
        energy = {f"energy_{count}": self.number() for count in (1, 4, 16, 64)}
        ranks = {"directions": 64, "effective_rank": self.number(1, 64), "stable_rank": 9.0, "edge": 2.0}
        return {"model": model} | energy | ranks | {"leading": [1.0, *map(float, leading)]}

    def alignment(self, a, b):
        return {"a": a, "b": b, "kept": 16, "output": self.number(), "input": self.number(), "chance": 0.25}

    def settings(self):
        if self.empty:
            return []
        kept = {"model": self.models[-1], "file": "config.json", "key": "rope_theta"}
        return [kept | {"reference": 10000.0, "value": None}, kept | {"reference": [1, 2], "value": "x"}]

    def advice(self):
        if self.empty:
            return []
        said = {"models": self.models[:1], "formula": "||t_i|| < 0.1 ||t_j||", "fix": f"remove {self.models[0]}"}
        evidence = {"kinship": 0.03, "others": [0.5, None, True], "by_model": dict.fromkeys(self.models, 1e-7)}
        return [
            said | {"kind": kind, "weight": weight, "title": f"{self.models[0]}: {kind}", "why": "because"}
            | {"evidence": evidence}
            for kind, weight in (("unrelated", "problem"), ("dominates", "warning"), ("scale", "hint"))
        ]  # fmt: skip

    def facts(self):
        rows = self.rows()
        whole = {"tensors": len(rows["tensors"]), "base_norm": 200.0, "interference": self.number()} | self.group()
        return {
            "version": 1,
            "recipe": "recipe.yaml",
            "method": "ties",
            "base": self.base,
            "models": {model: f"./{model}" for model in self.models},
            "compared_with": "base" if self.base else "mean",
            "summary": [f"{self.models[0]} is there", "all is well"],
            "advice": self.advice(),
            "whole": whole,
            "order": self.models[::-1],
            "linkage": [],
            "rows": rows,
            "remarks": [] if self.empty else ["tensors of two models are tied"],
            "cost": {"seconds": 3.2, "bytes_read": 10**9, "parameters": 10**8, "sampled": 0.125, "matrices": 10}
            | {"matrices_of": 30, "workers": 2},
        }
