"""Small tensors that are kept in float32 among weights of 16 bits, because 16 bits are too few for what they do.

Corrections of a router (DeepSeek-V3's `e_score_correction_bias` is added to scores whose differences decide which
expert answers) and the time constants of a state space (Mamba) are such tensors wherever they are; of others the
checkpoint tells: what its authors left in float32 among 16-bit weights they left so on purpose.
"""

import re
from collections import Counter

from mergetool.tensors.source import ModelSource

_ALWAYS = re.compile(r"(.*\.)?(e_score_correction_bias|A_log|D|dt_bias)")


class Islands:
    """Which tensors of a checkpoint are to stay as wide as they are."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        sizes: Counter[int] = Counter()
        for name, spec in source.specs.items():
            if spec.dtype.is_float:
                sizes[source.stored_as(name).bits] += spec.num_elements
        self._narrow = bool(sizes) and sizes.most_common(1)[0][0] == 16

    def __contains__(self, name: str) -> bool:
        wide = self._source.stored_as(name).bits > 16
        return wide and (self._narrow or bool(_ALWAYS.fullmatch(name)))
