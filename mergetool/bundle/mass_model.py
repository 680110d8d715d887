"""A bundle as a model: every input is answered by the experts that it belongs to, without being told which.

    model = mergetool.load_bundle("out/bundle")
    answer = model(["a text", "another"])     # or tensors: model(**tokenizer(texts, padding=True, return_tensors="pt"))
    answer.task, answer.logits, answer.tasks, answer.coefficients         # one each per sample

First pass: how near is each task? (See `mergetool.bundle.first_pass`.) Second pass: samples that chose the same tasks
form a group, and one pass runs all groups, each with its own weights (see `mergetool.bundle.grouped`). Then the heads
of a sample's tasks read its features (matrices here, classes of transformers in `mergetool.bundle.classes`), and the
calibrated best one answers.

Reference: Crisostomi et al., MASS, https://arxiv.org/abs/2504.05342, sections 3 and 4.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from mergetool.bundle.answer import Answer as Answer
from mergetool.bundle.answer import Routing as Routing
from mergetool.bundle.answer import Scored, answer, standing
from mergetool.bundle.arrow import Mix, Mixer
from mergetool.bundle.batch import check_batch, check_names, device_of, lengths_in, num_samples, take
from mergetool.bundle.calibration import read_calibration
from mergetool.bundle.classes import ClassNetwork
from mergetool.bundle.factors import Group, TaskFactors
from mergetool.bundle.files import copy_bundle, read_all
from mergetool.bundle.first_pass import FirstPass
from mergetool.bundle.generation import generate_in_groups, to_the_right_end
from mergetool.bundle.grouped import GroupedModel, Runs, SeveralGroups
from mergetool.bundle.known import Knowing
from mergetool.bundle.manifest import ClassHead, Head, Manifest, Pool, Unknown
from mergetool.bundle.readout import head_scores, pool_tokens
from mergetool.bundle.texts import TextReader, Texts, longest
from mergetool.bundle.verify import base_folder
from mergetool.errors import PlanError
from mergetool.kernels.arrow import shares
from mergetool.kernels.routing import coefficients, select
from mergetool.networks.spread import input_device, is_offloaded

if TYPE_CHECKING:
    from mergetool.networks.build import LoadedModel


Method = TypeVar("Method", bound=Callable[..., Any])


def _as_it_is(method: Method) -> Method:
    """What torch.compile runs as it is: which operations there are depends on the inputs."""
    return cast("Method", torch.compiler.disable(method))  # type: ignore[no-untyped-call]


class MassModel(nn.Module):
    """A routed bundle over a transformers model. `route`, `forward` and `generate` may be called by several threads."""

    def __init__(
        self,
        manifest: Manifest,
        base: "LoadedModel",
        factors: TaskFactors,
        folder: Path,
        networks: "Sequence[ClassNetwork]" = (),
    ) -> None:
        """`networks`: those of tasks with heads of their own class; `base` is what routes, and what all others read."""
        super().__init__()
        self.manifest = manifest
        self.folder = folder
        self.base = base.model
        self.networks = nn.ModuleList(networks)
        self._factors = factors
        alone = not any(base.model is network.base for network in networks)
        places = base.places
        self._grouped = (
            GroupedModel(base.model, places.names, factors, places.fragments) if alone else networks[0].grouped
        )
        self._heads = [
            read_all(folder / task.head.file) if isinstance(task.head, Head) else None for task in manifest.tasks
        ]
        self.calibration = read_calibration(folder)
        router = manifest.router
        self.first_pass = None if router is None else FirstPass(base, factors, router, folder)
        self.knowing: Knowing | None = None
        if self.unknown is not None and self.first_pass is not None:
            self.knowing = Knowing.read(self.unknown, folder, self.calibration, self.first_pass)
        self._mixer = None if router is None or router.per is None else Mixer(factors, router)
        self._reader = TextReader(self._tokenizer_folders(), longest(base.model))
        self.eval()

    @property
    def task_names(self) -> tuple[str, ...]:
        """All tasks, in order."""
        return self.manifest.names

    def tokenizer(self) -> Any:
        """The base's tokenizer, or an expert's where the base has none that can pad. Raises SourceError without any."""
        return self._reader.tokenizer

    def _tokenizer_folders(self) -> list[Path]:
        heads = [task.head for task in self.manifest.tasks]
        others = [(self.folder / head.file).parent for head in heads if isinstance(head, ClassHead)]
        return [base_folder(self.folder, self.manifest), *others]

    def read(self, text: Texts) -> dict[str, Tensor]:
        """Text as the model's inputs, where it wants them. Raises SourceError without a tokenizer, or for no text."""
        return {key: value.to(self.device) for key, value in self._reader.batch(text).items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the bundle to another folder, as `load_bundle` opens it: weights in the dtypes that they are kept in.

        Raises OutputError where something else lies there.
        """
        copy_bundle(self.folder, Path(folder))

    def _apply(self, fn: Any, recurse: bool = True) -> "MassModel":
        if is_offloaded(self.base):
            what = "a bundle whose base was dealt out with a device map stays where it is"
            raise PlanError(what, str(self.folder), "open it again, without device_map")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.follow()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises PlanError: what experts change of the base's modules, they change in these very modules."""
        what = "an open bundle cannot be copied in memory, pickled or quantised"
        raise PlanError(what, str(self.folder), f"open it again, or {_dense(self.folder, self.task_names[0])}")

    @property
    def device(self) -> torch.device:
        """Where it wants its inputs."""
        return input_device(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes; routing and matrices as heads are in float32."""
        return next(value.dtype for value in self.base.parameters() if value.is_floating_point())

    def follow(self) -> None:
        """Bring everything that belongs to the base to where that computes, and factors to its dtype."""
        device = self.device
        self._factors.to(device, self.dtype)
        self._heads = [
            None if head is None else {name: value.to(device) for name, value in head.items()} for head in self._heads
        ]
        if self.first_pass is not None:
            self.first_pass.to(device, self.dtype)
        if self.knowing is not None:
            self.knowing.to(device)

    # ---------------------------------------------------------------- first pass

    @torch.inference_mode()
    def route(self, text: Texts | None = None, /, **inputs: Tensor) -> Routing:
        """Where each sample of a batch belongs: of texts, or of `inputs` of the base model.

        Raises PlanError for a bundle without a router, SourceError for an empty batch.
        """
        inputs = self._inputs(text, inputs)
        router = self.manifest.router
        if router is None or self.first_pass is None:
            what = f"this bundle has no router (it was made by {self.manifest.kind})"
            raise PlanError(what, str(self.folder), f"say which: tasks=[{self.task_names[0]!r}]")
        if not router.matrices:
            return self._told(self.task_names, inputs)
        if self.knowing is None:
            distances, doubt = self.first_pass.judge(inputs)
        else:
            distances, doubt = self.knowing.judge(self.first_pass, inputs)
        temperature = router.temperature
        if self.calibration is not None:
            distances = distances - torch.tensor(self.calibration.offsets, device=distances.device)
            temperature *= self.calibration.temperature
        if router.norm == "arrow":
            weights = shares(-distances, temperature, router.top_k)
        else:
            weights = coefficients(distances, router.mode, temperature)
        chosen = select(weights, router.threshold, router.top_k)
        known = doubt <= (0.0 if self.knowing is None else self.knowing.most)
        if router.unknown is not None and router.unknown.answer != "nearest":
            chosen = [tasks if sure else () for tasks, sure in zip(chosen, known.tolist(), strict=True)]
        names = tuple(tuple(self.task_names[task] for task in tasks) for tasks in chosen)
        return Routing(names, weights, distances, known, self._probabilities(weights, distances), doubt)

    @property
    def unknown(self) -> Unknown | None:
        """What tells unknown inputs, if anything does."""
        return None if self.manifest.router is None else self.manifest.router.unknown

    @property
    def _refuses(self) -> bool:
        return self.unknown is not None and self.unknown.answer == "refuse"

    def _probabilities(self, weights: Tensor, distances: Tensor) -> Tensor:
        """(samples, tasks): coefficients, or less sure than those where features have fewer dimensions than numbers."""
        router = self.manifest.router
        if router is None or router.unknown is None or self.calibration is not None:
            return weights
        if router.norm != "likelihood" or router.mode != "weighted":
            return weights
        return coefficients(distances, router.mode, router.temperature / router.unknown.sharpness)

    # ---------------------------------------------------------------- second pass

    @_as_it_is
    @torch.inference_mode()
    def forward(
        self, text: Texts | None = None, /, *, tasks: Sequence[str] | Literal["route"] = "route", **inputs: Tensor
    ) -> Answer:
        """Answer a batch: texts, or `inputs` of the base model; `tasks` forces all samples to these tasks.

        Raises PlanError for a task that does not exist, SourceError for an empty batch.
        """
        inputs = self._inputs(text, inputs)
        routing = self._routing(tasks, inputs)
        groups = [tuple(self.task_names.index(name) for name in chosen) for chosen in routing.tasks]
        mix = self._mixer.mix(routing.coefficients) if self._mixer is not None and tasks == "route" else None
        if all(task.head is None for task in self.manifest.tasks):
            outputs = self._second_pass(groups, inputs, mix)
            if self._refuses:
                outputs[[not group for group in groups]] = float("-inf")
            nearest = [self.task_names[task] for task in routing.coefficients.argmax(-1).tolist()]
            best = [name if chosen else None for name, chosen in zip(nearest, routing.tasks, strict=True)]
            return self._judged(Answer(tuple(best), routing.tasks, routing.coefficients, outputs), routing)
        scored = self._ask_heads(groups, inputs, mix)
        for network in self.networks:
            scored |= network.scores(groups, inputs, mix)  # type: ignore[operator]
        return self._judged(answer(self.manifest, routing.tasks, routing.coefficients, scored), routing)

    def _judged(self, said: Answer, routing: Routing) -> Answer:
        """The answer with how sure it is of its tasks."""
        probability, runner_up = standing(self.task_names, routing.probabilities, said.task)
        return replace(said, known=tuple(routing.known.tolist()), probability=probability, runner_up=runner_up)

    def _inputs(self, text: Texts | None, inputs: dict[str, Any]) -> dict[str, Any]:
        if torch.compiler.is_exporting():
            what = "an exported program does the same for every input, and a bundle chooses experts"
            raise PlanError(what, str(self.folder), _dense(self.folder, self.task_names[0]))
        inputs = inputs if text is None else {**self.read(text), **inputs}
        check_names(self.base, inputs)
        check_batch({key: value for key, value in inputs.items() if isinstance(value, Tensor)})
        return inputs

    def _routing(self, tasks: Sequence[str] | Literal["route"], inputs: Mapping[str, Tensor]) -> Routing:
        if tasks == "route":
            return self.route(**inputs)
        return self._told(self.check_tasks(tasks), inputs)

    def _told(self, names: tuple[str, ...], inputs: Mapping[str, Tensor]) -> Routing:
        """All samples to these tasks."""
        count = num_samples(inputs)
        weights = torch.zeros(count, len(self.task_names), device=device_of(inputs))
        for name in names:
            weights[:, self.task_names.index(name)].fill_(1 / len(names))
        known = torch.ones(count, dtype=torch.bool)
        return Routing((names,) * count, weights, torch.zeros_like(weights), known, weights, weights.new_zeros(count))

    def check_tasks(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The given tasks in the bundle's order. Raises PlanError for one that does not exist."""
        known = f"the tasks are: {', '.join(self.task_names)}"
        if isinstance(tasks, str) or not tasks:
            raise PlanError(f"tasks is {tasks!r}, expected a list of names", "tasks", known)
        for name in tasks:
            if name not in self.task_names:
                raise PlanError(f"there is no task {name!r}", "tasks", known)
        return tuple(name for name in self.task_names if name in tasks)

    def _second_pass(self, groups: Sequence[Group], inputs: Mapping[str, Tensor], mix: Mix | None = None) -> Tensor:
        """Last layer (samples, tokens, features) or logits of language models, in the order of the samples.

        One pass for samples of all groups is tried first. Whether the model's code allows that shows only as it runs:
        a module that reads another one's weight finds not one value but one for each group. It then has them one after
        the other, here and in every later call.
        """
        if mix is not None:
            return self._pass(Runs.mixed(mix, len(groups)), inputs)
        try:
            return self._run_groups(groups, inputs)
        except SeveralGroups:
            self._grouped.mixable = False
            return self._run_groups(groups, inputs)

    def _run_groups(self, groups: Sequence[Group], inputs: Mapping[str, Tensor]) -> Tensor:
        """The samples sorted by group, so that each group's weights are used on one run of rows; then put back.

        Tasks have inputs of different lengths: where what that saves is worth several passes, groups go one by one,
        each no wider than its longest sample.
        """
        num_samples = len(groups)
        order = sorted(range(num_samples), key=lambda sample: groups[sample])
        distinct = sorted(set(groups))
        counts = [groups.count(group) for group in distinct]
        bounds = [sum(counts[:place]) for place in range(len(counts) + 1)]
        batch = take(inputs, order)
        ends = list(pairwise(bounds))
        lengths = lengths_in(batch, ends) if any(self._heads) else None
        if len(distinct) == 1 or (self._grouped.mixable and lengths is None):
            outputs = self._pass(Runs(tuple(distinct), tuple(bounds)), batch)
        else:
            parts = []
            for place, (start, stop) in enumerate(ends):
                part = take(batch, list(range(start, stop)))
                if lengths is not None:
                    part = {key: value[:, : lengths[place]] for key, value in part.items()}
                parts.append(self._pass(Runs((distinct[place],), (0, stop - start)), part))
            if lengths is not None:
                width = inputs["attention_mask"].shape[1]
                parts = [nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts]
            outputs = torch.cat(parts)
        back = torch.empty(num_samples, dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(num_samples)
        return outputs[back.to(outputs.device)]

    def _pass(self, runs: Runs, inputs: Mapping[str, Any]) -> Tensor:
        with self._grouped.using(runs):
            output = self.base(**inputs)
        values: Tensor = output.last_hidden_state if any(self._heads) or "logits" not in output else output.logits
        return values

    @torch.inference_mode()
    def generate(
        self, text: Texts | None = None, /, *, tasks: Sequence[str] | Literal["route"] = "route", **inputs: Any
    ) -> Tensor:
        """Continue prompts: routed once on the prompt, then each group generates with its own weights.

        Texts, or tensors of the batch, and options of transformers' `generate` in, token ids (samples, longest) out,
        padded on the right with the model's padding token.
        """
        if len(self.networks):
            fix = "ask for an answer: model(**inputs)"
            raise PlanError("the experts of this bundle are classifiers, which generate nothing", "generate", fix)
        inputs = self._inputs(text, inputs)
        tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
        options = {key: value for key, value in inputs.items() if key not in tensors}
        if self._mixer is not None and tasks == "route":
            return self._generate_mixed(self._mixer, tensors, options)
        routing = self._routing(tasks, tensors)
        groups = [tuple(self.task_names.index(name) for name in chosen) for chosen in routing.tasks]
        return generate_in_groups(self.base, groups, tensors, options, self._using, refuses=self._refuses)

    def _using(self, group: Group, count: int) -> AbstractContextManager[None]:
        return self._grouped.using(Runs((group,), (0, count)))

    def _generate_mixed(self, mixer: Mixer, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """All prompts at once, with shares of all experts; those of a sequence are those of its prompt."""
        if self._refuses:
            return self._generate_known(mixer, inputs, options)
        count = num_samples(inputs)
        mix = Mix(mixer) if mixer.router.per == "token" else Mix(mixer, self.route(**inputs).coefficients)
        with self._grouped.using(Runs.mixed(mix, count)):
            generated: Tensor = self.base.generate(**to_the_right_end(inputs), **options)  # type: ignore[operator]
        return generated

    def _generate_known(self, mixer: Mixer, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """The same for prompts that are known; the others stay as they are."""
        routing = self.route(**inputs)
        mix = mixer.mix(routing.coefficients[routing.known])
        groups: list[Group] = [(0,) if known else () for known in routing.known.tolist()]
        return generate_in_groups(
            self.base,
            groups,
            inputs,
            options,
            lambda _, count: self._grouped.using(Runs.mixed(mix, count)),
            refuses=True,
        )

    # ---------------------------------------------------------------- heads

    def _ask_heads(self, groups: Sequence[Group], inputs: Mapping[str, Tensor], mix: Mix | None) -> dict[int, Scored]:
        """What matrices say of the samples in whose group their tasks are."""
        samples = [i for i, group in enumerate(groups) if any(self._heads[task] is not None for task in group)]
        if not samples:
            return {}
        asked = take(inputs, samples)
        mix = None if mix is None else mix.take(samples)
        hidden = self._second_pass([groups[sample] for sample in samples], asked, mix).float()
        pooled: dict[Pool, Tensor] = {}
        scored = {}
        for place, (task, weights) in enumerate(zip(self.manifest.tasks, self._heads, strict=True)):
            rows = [row for row, sample in enumerate(samples) if place in groups[sample]]
            if rows and weights is not None and isinstance(task.head, Head):
                if (pool := task.head.pool) not in pooled:
                    pooled[pool] = pool_tokens(hidden, asked.get("attention_mask"), pool)
                features = pooled[pool][rows]
                scored[place] = Scored(
                    [samples[row] for row in rows], head_scores(features, task.head, weights), features
                )
        return scored


def _dense(folder: Path, task: str) -> str:
    """How to get one expert as an ordinary model, with which everything can be done."""
    return f"take one expert out, and use that: mergetool bundle dense {folder} {task} -o {task}"
