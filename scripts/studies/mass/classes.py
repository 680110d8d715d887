"""Every class of transformers with a head that a bundle keeps: does an expert answer in the bundle as it does alone?

    python -m scripts.studies.mass.classes [sequence|token|question|image|audio|video ...] [--only TYPE ...]

For each model type of transformers' mappings: a tiny base, two experts around it, a library of all their directions,
and the largest difference between the expert's scores and the bundle's, relative to the largest score. `ok` below 1e-3;
`no input` where transformers itself does not run what is made up here. `LEFT_OUT` in configs.py are not tried.
"""

import argparse
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

import mergetool
from mergetool.testing.classifiers import (
    audio_inputs,
    expert_answer,
    image_inputs,
    save_experts,
    text_inputs,
    tiny_config,
)
from scripts.studies.mass.configs import BASES, CONFIGS, IMAGE_SIZES, LEFT_OUT

MAPPINGS = {
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "video": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
}
_NO_INPUT = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, ImportError)
SECONDS = 90
"""Time for one class; what takes longer has a config that is not small enough."""


def inputs_for(group: str, family: str) -> dict[str, Tensor]:
    """Five samples, or a few."""
    if group == "image":
        return (
            {"input_ids": torch.randint(0, 50, (5, 8))}
            if family == "imagegpt"
            else image_inputs(5, IMAGE_SIZES.get(family, 16))
        )
    if group == "video":
        name = "pixel_values_videos" if family in ("vjepa2", "videoprism_vision_model") else "pixel_values"
        return {name: torch.randn(3, 2 if family == "timesformer" else 4, 3, 16, 16)}
    if group == "audio":
        return _audio(family)
    inputs = text_inputs()
    if family in ("bros", "lilt", "layoutlm"):
        inputs["bbox"] = torch.randint(0, 30, (5, 8, 1)).expand(5, 8, 4).clone()
    if family == "longformer" and group == "question":  # the question ends at the third separator
        inputs["input_ids"][inputs["input_ids"] == 2] = 4
        inputs["input_ids"][:, 1:4] = 2
    return inputs


def _audio(family: str) -> dict[str, Tensor]:
    if family == "whisper":
        return audio_inputs()
    if family == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(3, 32, 16)}
    if family == "wav2vec2-bert":
        return {"input_features": torch.randn(3, 20, 20), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    mask = torch.ones(3, 2000, dtype=torch.long)
    mask[1, 1500:] = 0
    return {"input_values": torch.randn(3, 2000), "attention_mask": mask}


def compare(folder: Path, kind: Any, base: Any, inputs: dict[str, Tensor], more: dict[str, Any]) -> tuple[str, str]:
    """A verdict, and its evidence."""
    spans = "QuestionAnswering" in kind.__name__
    try:
        config = tiny_config(kind, **more)
        paths = save_experts(folder, kind, config, base, **({"a": 2, "b": 2} if spans else {"a": 3, "b": 4}))
        expected = {task: _scores(expert_answer(paths[task], kind, inputs), spans=spans) for task in "ab"}
    except (
        ValueError,
        RuntimeError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
        ImportError,
    ) as e:
        return "no input", f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
    recipe = {
        "base": str(paths["base"]),
        "models": {task: str(paths[task]) for task in "ab"},
        "merge": {"method": "tsv-compress", "rank": 1.0, "factors": "float32", "size": 100.0},
    }
    try:
        model = mergetool.load_bundle(mergetool.run(recipe, output=folder / "out").path)
        worst = 0.0
        for task, scores in expected.items():
            found = _scores(model(tasks=[task], **inputs), spans=spans)[..., : scores.shape[-1]]
            seen = scores.isfinite() & (scores.abs() < 1e30)
            error = (found - scores)[seen].abs().max() / scores[seen].abs().max().clamp_min(1)
            worst = max(worst, float(error))
    except mergetool.MergetoolError as error:
        return "refused", " ".join(str(error).split())[:140]
    return ("ok" if worst < 1e-3 else "WRONG"), f"{worst:.1e}"


def _scores(answer: Any, *, spans: bool) -> Tensor:
    return torch.stack([answer.start_logits, answer.end_logits], -1) if spans else answer.logits


def _late(*_: Any) -> None:
    raise RuntimeError("takes too long: the config is not small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("groups", nargs="*", choices=[*MAPPINGS, []], default=[])
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    for group in chosen.groups or MAPPINGS:
        verdicts: list[str] = []
        for family, names in MAPPINGS[group].items():
            if family in LEFT_OUT or (chosen.only and family not in chosen.only):
                continue
            name = names if isinstance(names, str) else names[0]
            verdicts.append(_row(group, family, name))
        counts = ", ".join(f"{verdicts.count(each)} {each}" for each in sorted(set(verdicts)))
        print(f"{group}: {counts}", flush=True)


def _row(group: str, family: str, name: str) -> str:
    found = BASES.get(family) or modeling_auto.MODEL_MAPPING_NAMES.get(family, name)
    base = found if isinstance(found, str) else found[0]
    started = time.monotonic()
    torch.manual_seed(3)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            kinds = getattr(transformers, name), getattr(transformers, base)
            verdict, evidence = compare(Path(folder), *kinds, inputs_for(group, family), CONFIGS.get(family, {}))
    except RuntimeError as error:
        verdict, evidence = "slow", str(error)[:100]
    finally:
        signal.alarm(0)
    print(f"{group:10} {family:28} {verdict:9} {evidence} [{time.monotonic() - started:.1f} s]", flush=True)
    return verdict


if __name__ == "__main__":
    main()
