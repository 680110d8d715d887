"""Which tensors of a model an adapter changes, and how: from the names and shapes of both, before a weight is read.

Whole tensors come first (PEFT loads them into the model), then what is added to them. Everything in an adapter has its
place in the model, or the adapter is refused by the name of what has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.checkpoints.adapters import experts
from mergetool.checkpoints.adapters.changes import Added, Block, Change, LowRank, Magnitude, Rows
from mergetool.checkpoints.adapters.conv1d import is_transposed
from mergetool.checkpoints.adapters.keys import Key, Part, attention_around, by_site, factors_at, read_keys, unwrapped
from mergetool.checkpoints.adapters.places import INPUTS, Places, is_vocabulary_weight, leaf_of
from mergetool.checkpoints.adapters.refusals import by_peft
from mergetool.checkpoints.adapters.settings import Settings
from mergetool.checkpoints.adapters.whole import Whole
from mergetool.errors import SourceError
from mergetool.tensors.header import TensorSpec

_IN_PROJECTION = "in_proj_weight"
"""The parameter that torch's MultiheadAttention keeps query, key and value in."""
_Specs = Mapping[str, TensorSpec]


class Matching:
    """The changes that an adapter makes to the tensors `specs` of a model."""

    def __init__(
        self, own: _Specs, specs: _Specs, settings: Settings, config: Mapping[str, Any], base: Path | None
    ) -> None:
        where = str(settings.folder)
        self._folders = (settings.folder, base)
        self._own = own
        self._specs = specs
        self._settings = settings
        self._config = config
        self._where = where
        keys = read_keys(own, where)
        self._places = Places(specs, config, _names_in_memory(keys, settings))
        self.warnings: list[str] = []
        whole = Whole(own, specs, settings, self._places, where, self._by_peft())
        self.changes = whole.changes([key for key in keys if key.part is Part.WHOLE])
        self._sites = by_site(keys)
        for site, parts in self._sites.items():
            self._add(unwrapped(site), site, parts)
        if not self.changes:
            raise SourceError("the adapter changes nothing", where, "name a folder that peft saved an adapter to")
        self.warnings += whole.warnings
        self._warn_of_lost_biases()
        self._check_vocabulary()

    # ------------------------------------------------------------------ one module

    def _add(self, module: str, site: str, parts: Mapping[Part, str]) -> None:
        if Part.TOKENS in parts:
            self._add_rows(module, parts[Part.TOKENS])
        if parts.keys() - {Part.TOKENS}:
            a, b, embedding = factors_at(parts, self._own, self._where, self._fix())
            self._add_low_rank(module, site, parts, a, b, embedding=embedding)
        if Part.BIAS in parts:
            self._add_bias(module, parts[Part.BIAS], parts[Part.A])

    def _add_low_rank(
        self, module: str, site: str, parts: Mapping[Part, str], a: TensorSpec, b: TensorSpec, *, embedding: bool
    ) -> None:
        where = f"{self._where}: {a.name}"
        around = attention_around(site, self._sites)
        products = list(self._products(module, around or module, a, b, embedding=embedding))
        if not products:
            raise self._no_tensor(f"{module}.weight", a.name)
        times = 1 if around is None else 2
        for name, term in products:
            self._check_floating(name, a, b, where)
            self._change(name, LowRank(a.name, b.name, times * term.factor, term.transposed, term.block), where)
            self._add_magnitude(name, parts, by_row=not term.transposed)

    # ------------------------------------------------------------------ where a product goes

    def _products(
        self, module: str, named: str, a: TensorSpec, b: TensorSpec, *, embedding: bool
    ) -> Iterator[tuple[str, LowRank]]:
        """Every tensor that B A is added to, and how, by the settings of the module that is `named` in them."""
        name = self._places.counterpart(f"{module}.weight")
        if name is None and f"{module}.weight" in self.changes:  # a head that is no longer tied
            name = f"{module}.weight"
        if name is None and (len(a.shape) == 2):
            name = self._places.shared(module, (0, a.shape[1] if not embedding else b.shape[0]))
        if name is None:
            yield from self._parameters(module, a, b)
            return
        shape = self._shape(name)
        product = (b.shape[0], *a.shape[1:]) if not embedding else (a.shape[1], b.shape[0])
        transposed = embedding
        direct = self._settings.targets(f"{module}.weight")
        if not embedding and not direct and len(a.shape) == 2 and len(shape) == 2:
            flag = self._settings.flag_transposed
            transposed = is_transposed(module, (product[0], product[1]), shape, self._config, flag=flag)
            product = product[::-1] if transposed else product
        kernel_of_b = b.shape[2:]
        if product != shape or any(size != 1 for size in kernel_of_b):
            raise SourceError(
                f"B A is {list(product)}, {name} is {list(shape)}", f"{self._where}: {a.name}", self._fix()
            )
        factor = self._settings.factor(f"{module}.weight" if direct else named, a.shape[0])
        term = LowRank(a.name, b.name, factor, transposed)
        for twin in self._places.twins(name):
            yield twin, term
        self._warn_tied(module, name)

    def _parameters(self, module: str, a: TensorSpec, b: TensorSpec) -> Iterator[tuple[str, LowRank]]:
        """Parameters that are no module's weight: experts, projections in one."""
        if len(a.shape) != 2:
            return
        size_in, size_out = a.shape[1], b.shape[0]
        for leaf in dict.fromkeys([*self._settings.parameters(), *experts.FUSED, _IN_PROJECTION]):
            name = self._places.counterpart(f"{module}.{leaf}")
            if name is None:
                continue
            shape = self._shape(name)
            full = f"{module}.{leaf}"
            if leaf == _IN_PROJECTION and not self._settings.targets(full):
                full = module
            if shape == (size_out, size_in):
                yield name, LowRank(a.name, b.name, self._settings.factor(full, a.shape[0]))
                return
            in_out = experts.is_in_out(shape, size_in, size_out, self._config) if len(shape) == 3 else None
            if in_out is not None and a.shape[0] % shape[0] == 0:
                factor = self._settings.factor(full, a.shape[0] // shape[0])
                yield name, LowRank(a.name, b.name, factor, in_out, Block(shape[0]))
                return
        for name, block, leaf in experts.separate(module, size_in, size_out, self._places, self._specs):
            if a.shape[0] % block.count == 0:
                factor = self._settings.factor(f"{module}.{leaf}", a.shape[0] // block.count)
                yield name, LowRank(a.name, b.name, factor, False, block)

    # ------------------------------------------------------------------ the rest

    def _add_rows(self, module: str, own: str) -> None:
        where = f"{self._where}: {own}"
        spec = self._own[own]
        name = self._places.counterpart(f"{module}.weight") or self._places.shared(module, spec.shape)
        if name is None:
            raise self._no_tensor(f"{module}.weight", own)
        indices, shape = self._settings.tokens(module), self._shape(name)
        if spec.shape != (len(indices), *shape[1:]) or max(indices) >= shape[0]:
            what = f"it is {list(spec.shape)} for {len(indices)} rows up to {max(indices)}, {name} is {list(shape)}"
            raise SourceError(what, where, self._fix())
        for twin in self._places.twins(name):
            change = self._started(twin)
            self.changes[twin] = replace(change, rows=(*change.rows, Rows(own, indices)))

    def _add_magnitude(self, name: str, parts: Mapping[Part, str], *, by_row: bool) -> None:
        uses, own = self._settings.fields.get("use_dora") is True, parts.get(Part.MAGNITUDE)
        if uses != (own is not None):
            what = f"use_dora is {uses}, but there is {'a' if own else 'no'} magnitude for {name}"
            raise SourceError(what, self._settings.where, "save the adapter again")
        if own is None:
            return
        change, spec = self.changes[name], self._own[own]
        sizes = change.shape[0] if by_row else change.shape[1]
        if spec.num_elements != sizes or len(change.terms) != 1:
            times = len(change.terms)
            what = f"its magnitude is {list(spec.shape)}, {name} is {list(change.shape)}, changed {times} times"
            fix = self._fix() if times == 1 else self._by_peft()
            raise SourceError(what, f"{self._where}: {own}", fix)
        self.changes[name] = replace(change, magnitude=Magnitude(own, by_row))

    def _add_bias(self, module: str, own: str, a: str) -> None:
        name = self._places.counterpart(f"{module}.bias")
        if name is None or self._shape(name) != self._own[own].shape:
            raise self._no_tensor(f"{module}.bias", own)
        self._check_floating(name, self._own[own], self._own[own], f"{self._where}: {own}")
        factor = self._settings.factor(module, self._own[a].shape[0])
        self.changes[name] = self._started(name).with_term(Added(own, factor))

    def _change(self, name: str, term: LowRank, where: str) -> None:
        change = self._started(name)
        if change.is_own and (".base_layer." not in change.origin):
            raise SourceError(f"{name} is both adapted and replaced, by {change.origin}", where, self._by_peft())
        others = [other for other in change.terms if isinstance(other, LowRank)]
        if (others and self._places.is_tied is False) or any(other.block for other in others):
            raise SourceError(f"{name} is changed twice, by {others[0].a} too", where, self._fix())
        self.changes[name] = change.with_term(term)

    def _started(self, name: str) -> Change:
        return self.changes.get(name) or Change(name, self._specs[name].shape, name)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._started(name).shape

    def _check_floating(self, name: str, a: TensorSpec, b: TensorSpec, where: str) -> None:
        change = self._started(name)
        weight = (self._own if change.is_own else self._specs)[change.origin]
        if not (a.dtype.is_float and b.dtype.is_float and weight.dtype.is_float):
            what = (
                f"A is {a.dtype.name}, B is {b.dtype.name}, {name} is {weight.dtype.name}; all must be floating point"
            )
            raise SourceError(what, where, self._fix())

    def _warn_tied(self, module: str, name: str) -> None:
        """Merged, a change of one of two tied layers reaches both; PEFT does the same when it merges."""
        is_input = leaf_of(module) in INPUTS
        absent = self._places.counterpart(f"{module}.weight") is None
        if absent or len(self._places.twins(name)) > 1 or (is_input and self._places.lacks_head()):
            text = f"{module} is tied to another layer: merged, as by PEFT, its change reaches both of them"
            self.warnings += [text] if text not in self.warnings else []

    def _warn_of_lost_biases(self) -> None:
        """From 0.9 on PEFT trained the biases of adapted layers, and for long did not save them."""
        if self._settings.fields.get("bias") != "lora_only":
            return
        biases = {site: self._places.counterpart(f"{unwrapped(site)}.bias") for site in self._sites}
        lost = [unwrapped(site) for site, bias in biases.items() if bias is not None and bias not in self.changes]
        if lost:
            what = f"bias is 'lora_only', but the file lacks the biases of {len(lost)} layers ({lost[0]} first)"
            self.warnings.append(f"{what}, which many versions of peft trained and did not save: they stay the model's")

    def _check_vocabulary(self) -> None:
        """Tensors that had a row for every token must have one afterwards."""
        grown = [
            change
            for change in self.changes.values()
            if change.name in self._specs and is_vocabulary_weight(change.name)
        ]
        for change in grown:
            before, now = self._specs[change.name].shape[0], change.shape[0]
            for other, spec in self._specs.items():
                rows = self._shape(other)[0] if spec.shape else 0
                if is_vocabulary_weight(other) and spec.shape[0] == before and rows != now:
                    what = f"it brings {now} rows of {change.name}, but {other} keeps its {rows}"
                    layer = leaf_of(other.removesuffix(".weight"))
                    fix = f"train it with modules_to_save=[{layer!r}] too: the rows of the new tokens are nowhere"
                    raise SourceError(what, self._where, fix)

    def _no_tensor(self, name: str, own: str) -> SourceError:
        fix = f"{self._fix()}; if it is that one, {self._by_peft()}"
        return SourceError(f"the model has no tensor {name!r}", f"{self._where}: {own}", fix)

    def _by_peft(self) -> str:
        return by_peft(self._settings.fields, *self._folders)

    def _fix(self) -> str:
        made_for = self._settings.made_for
        return f"use the model it was trained on{f', {made_for}' if made_for else ''}"


def _names_in_memory(keys: Sequence[Key], settings: Settings) -> Iterator[str]:
    """What the tensors that an adapter may mean are called in memory."""
    sites = {key.site for key in keys}
    for key in keys:
        if key.part is Part.WHOLE:
            yield key.module
            continue
        has_bias = key.part is Part.BIAS or settings.fields.get("bias") == "lora_only"
        leaves = ["weight", *(["bias"] if has_bias else []), *settings.parameters()]
        leaves += experts.FUSED if leaf_of(key.module) == "experts" else ()
        leaves += [_IN_PROJECTION] if f"{key.site}.base_layer.out_proj" in sites else []
        yield from (f"{key.module}.{leaf}" for leaf in leaves)
