"""Models with PEFT adapters on top, merged while they are read, exactly as PEFT merges them, or refused by name.

AdapterSource(model, folder) -> ModelSource        model with one adapter; more of them stack
AdapterAlone(folder) -> ModelSource                an adapter by itself: what it adds to weights

settings    what adapter_config.json means         refusals   what is refused, and the command that gets on
keys        what the adapter's tensors are called  places     the model's names for them
matching    which tensor changes how               experts    layers of a mixture, one tensor or many
changes     the changes, as data                   arithmetic the numbers, slice by slice
sites       what an adapter holds by itself
conv1d      which layers store transposed weights  files      the adapter's weights, safetensors or .bin
"""

from mergetool.checkpoints.adapters.alone import AdapterAlone
from mergetool.checkpoints.adapters.sites import Site, SiteKind
from mergetool.checkpoints.adapters.source import AdapterSource

__all__ = ["AdapterAlone", "AdapterSource", "Site", "SiteKind"]
