"""Where networks run, as flags say it."""

from mergetool.engine import Flags
from mergetool.engine.devices import device_for_networks
from mergetool.errors import PlanError


def device_of(flags: Flags) -> str:
    """Where networks are, and where what they are made of is merged.

    Raises PlanError for a device that cannot be used, or beside a device map.
    """
    if flags.device_map is None:
        return device_for_networks(flags.device)
    if flags.device not in ("auto", "cpu"):
        what = f"{flags.device!r} would have no effect beside --device-map, which deals networks out by itself"
        raise PlanError(what, "--device", "leave one of both out")
    return "cpu"
