"""Every output tensor comes from the tensors that have its name. What a recipe means that says nothing else."""

from collections.abc import Sequence

from mergetool.layouts.base import Arrangement, Layout, Origin, Sources


class Same(Layout):
    """The names of the base (or of all models together, where there is none), in file order."""

    def arrange(self, sources: Sources, leader: str, models: Sequence[str]) -> Arrangement:
        order = (leader, *(model for model in models if model != leader))
        extra = dict.fromkeys(_in_file_order(sources, leader), False)
        for model in order[1:]:
            for name in _in_file_order(sources, model):
                extra.setdefault(name, "base" in sources)
        return Arrangement([_origin(name, sources, models, lacks) for name, lacks in extra.items()])


def _in_file_order(sources: Sources, model: str) -> list[str]:
    return sorted(sources[model].specs, key=sources[model].position)


def _origin(name: str, sources: Sources, models: Sequence[str], extra: bool) -> Origin:
    having = {model: name for model, source in sources.items() if name in source.specs}
    return Origin(name, having, tuple(models), extra)
