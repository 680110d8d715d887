"""Let AutoModel open bundles.

    import mergetool.bundle.auto                                 # registers the model type "mass"
    model = transformers.AutoModel.from_pretrained("out/bundle")

Without the import, `AutoModel.from_pretrained("out/bundle", trust_remote_code=True)` finds this file through the
bundle's own modeling_mass.py.
"""

from pathlib import Path
from typing import Any

import torch

from mergetool.bundle.opening import load_bundle
from mergetool.networks.library import library

_TRANSFORMERS = library("running a bundle", "bundle")
_CONFIG: Any = _TRANSFORMERS.PretrainedConfig
_MODEL: Any = _TRANSFORMERS.PreTrainedModel


class MassConfig(_CONFIG):  # type: ignore[misc]
    """config.json of a bundle: the base's config inside."""

    model_type = "mass"

    def __init__(self, base_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_config = base_config or {}


class AutoMassModel(_MODEL):  # type: ignore[misc]
    """What AutoModel finds under the model type "mass". `from_pretrained` gives a `mergetool.bundle.MassModel`."""

    config_class = MassConfig

    @classmethod
    def from_pretrained(cls, path: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
        """Open a bundle folder; as `mergetool.load_bundle`."""
        return load_bundle(Path(path), dtype=dtype if isinstance(dtype, torch.dtype) else None)


_TRANSFORMERS.AutoConfig.register("mass", MassConfig, exist_ok=True)
_TRANSFORMERS.AutoModel.register(MassConfig, AutoMassModel, exist_ok=True)
