"""The devices that tests try: the stand-in always, and a GPU where there is one.

@every_device
def test_it_works(device):
    with present(device):
        mergetool.run(recipe, device=device)
"""

import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.elsewhere import DEVICE, Elsewhere, There

STAND_IN = str(DEVICE)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
every_device = pytest.mark.parametrize(
    "device",
    [pytest.param(STAND_IN, id="stand-in"), pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, needs_gpu])],
)


class Small(Elsewhere):
    """The stand-in with memory for numbers in tensors of so many elements only."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def _check(self, out):
        super()._check(out)
        made = [each for each in tree_leaves(out) if isinstance(each, There) and each.is_floating_point()]
        if any(each.numel() > self.room for each in made):
            raise torch.OutOfMemoryError("no room")


@contextmanager
def present(device, room=None):
    """While inside, the device is there, in threads that begin now, too: modes of torch belong to one thread each."""
    if device != STAND_IN:
        yield
        return
    run = threading.Thread.run

    def stand_in():
        return Elsewhere() if room is None else Small(room)

    def there(thread):
        with stand_in():
            run(thread)

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", there)
        patch.setattr(torch.inference_mode, "__enter__", lambda _: None)  # the stand-in's views cannot be made in it
        patch.setattr(torch.inference_mode, "__exit__", lambda *_: None)
        stack.enter_context(torch.no_grad())
        stack.enter_context(stand_in())
        yield
