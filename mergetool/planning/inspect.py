"""What a checkpoint's headers tell, and whether anything about them looks wrong."""

from collections import Counter
from pathlib import Path
from typing import Any

from mergetool.errors import at
from mergetool.planning.sources import Lookup
from mergetool.tensors.folder import is_adapter
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, SafetensorsSource


def facts_about(reference: str | Path) -> dict[str, Any]:
    """Headers of a model, here or on the Hub, as JSON-able facts. Raises SourceError for one that is damaged."""
    lookup = Lookup(Path.cwd(), as_stored=True)
    if is_adapter(Path(reference)):
        return _about_adapter(Path(reference), lookup)
    with at("inspect"):
        source = lookup.open("model", str(reference))
    origin = lookup.origins["model"][0]
    config = read_config(source.folder)
    specs = [source.specs[name] for name in sorted(source.specs, key=source.position)]
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype.name] += spec.num_bytes
    facts: dict[str, Any] = {
        "path": str(reference),
        "commit": origin.commit,
        "licence": origin.licence or "unknown",
        "architecture": _architecture(config),
        "parameters": sum(spec.num_elements for spec in specs if spec.dtype.is_float),
        "num_tensors": len(specs),
        "bytes_by_dtype": dict(sizes),
        "files": {stamp.path.name: stamp.size for stamp in source.files},
        "tied_embeddings": bool(config.get("tie_word_embeddings")) if config else "unknown",
        "remarks": _remarks(source, config),
        "tensors": [
            {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.num_bytes} for s in specs
        ],
    }
    return facts


def _about_adapter(folder: Path, lookup: Lookup) -> dict[str, Any]:
    """What a folder with an adapter holds: changes of a model's tensors, in factors or in full."""
    with at("inspect"):
        adapter = lookup.open_adapter("adapter", str(folder))
    products = [site for site in adapter.sites.values() if site.is_product]
    return {
        "path": str(folder),
        "licence": lookup.origins["adapter"][0].licence or "unknown",
        "architecture": "LoRA adapter",
        "base": adapter.made_for or "unknown",
        "products": len(products),
        "ranks": sorted({site.rank for site in products}),
        "in full": len(adapter.sites) - len(products),
        "needs its base": list(adapter.needs_base),
        "files": {stamp.path.name: stamp.size for stamp in adapter.files},
        "remarks": list(lookup.warnings),
        "tensors": [
            {"name": s.name, "dtype": adapter.stored_as(s.name).name, "shape": list(s.shape), "bytes": s.num_bytes}
            for s in adapter.specs.values()
        ],
    }


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0] if isinstance(names, list) and names else config.get("model_type") or "unknown")


def _remarks(source: ModelSource, config: dict[str, Any]) -> list[str]:
    remarks = list(source.remarks)
    if isinstance(source, SafetensorsSource):
        for stamp, header in zip(source.files, source.headers, strict=True):
            crooked = [s.spec.name for s in header.slots.values() if s.begin % max(1, s.spec.dtype.bits // 8)]
            if crooked:
                remarks.append(f"{stamp.path.name}: {len(crooked)} tensors are not aligned, first {crooked[0]!r}")
            known = sum(name in header.slots for name in source.specs)
            if known != len(header.slots):
                remarks.append(f"{stamp.path.name}: {len(header.slots) - known} tensors are not in the index")
    else:
        remarks.append("stored as pickle; safetensors is safer and faster")
    if config.get("quantization_config"):
        remarks.append("quantised: dequantise before merging")
    if source.folder is not None and not config:
        remarks.append("no config.json")
    return remarks
