"""The processes of one search: each has its own live model, and all of them hear every answer.

`torchrun --nproc-per-node 4 -m mergetool run recipe.yaml` (or `accelerate launch`, on one or many nodes that share a
file system). Questions are dealt out in order and answers are taken in order, so that the search is the same for any
number of processes; the first one keeps the journal and writes the result. One process is the degenerate case.
"""

import os
from typing import Any


class Team:
    """This process among those of the search."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self._group: Any = None
        if self.size > 1:
            import torch.distributed

            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            self._group = torch.distributed.new_group(backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this process keeps the journal and writes the result."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: every one takes its own where a kind without number is asked for."""
        if asked == "auto":
            return "cpu"
        return f"{asked}:{os.environ.get('LOCAL_RANK', '0')}" if asked == "cuda" and self.size > 1 else asked

    def gather(self, own: Any) -> list[Any]:
        """What every process has, in order of rank."""
        if self.size == 1:
            return [own]
        import torch.distributed

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, own, group=self._group)
        return found
