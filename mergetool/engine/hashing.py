"""SHA-256 of every file that a run reads or writes, while its bytes are in the page cache.

input file      hashed early when all inputs fit in the page cache, else when the last of its tensors was read
output file     hashed from its front on as units are finished; then synced
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial

from mergetool.engine.incremental_hash import IncrementalHash
from mergetool.engine.partition import Partition
from mergetool.engine.schedule import Job, Schedule
from mergetool.outputs.journal import Journal
from mergetool.outputs.record import Record
from mergetool.planning import Plan, Step
from mergetool.planning.cost import available_memory
from mergetool.tensors.digests import remembered_sha256
from mergetool.tensors.writer import SlotWriter


class NoHashes:
    """Nobody asks what was read or written: merges in memory."""

    def begin(self, to_do: Mapping[int, int]) -> None:
        """Nothing is read yet."""

    def read(self, step: Step) -> None:
        """A unit of this step is done with its operands."""

    def written(self, step: Step, start: int, stop: int) -> None:
        """Elements [start, stop) are in all slots of a step."""

    def settle(self) -> None:
        """Nothing that was written will change any more."""


class Hashes(NoHashes):
    """Queues the hashing of files, and records the digests."""

    def __init__(
        self, plan: Plan, writer: SlotWriter, journal: Journal, schedule: Schedule, record: Record, mine: Partition
    ) -> None:
        self._plan = plan
        self._writer = writer
        self._journal = journal
        self._schedule = schedule
        self._record = record
        self._mine = mine
        self._files = {str(stamp.path): stamp for stamps in plan.stamps.values() for stamp in stamps}
        self._left_of_file: Counter[str] = Counter()
        self._settled = all(stage.name != "finish" for stage in plan.stages)
        self._outputs = [
            IncrementalHash(writer.path(index), shard.header.file_size, len(shard.prefix))
            for index, shard in enumerate(plan.shards[: writer.num_files])
        ]

    def begin(self, to_do: Mapping[int, int]) -> None:
        """Hash inputs at once where they will stay in the page cache for merging; else after their last use.

        `to_do`: how many units of each step this process will make, by index.
        """
        size = sum(stamp.size for stamp in self._files.values())
        if size > available_memory() // 2:
            for step in self._plan.steps:
                for path in self._paths(step):
                    self._left_of_file[path] += to_do[step.index]
        mine = filter(self._mine.hashes_input, self._files)
        self._schedule.add(self._job(path) for path in mine if self._left_of_file[path] == 0)

    def read(self, step: Step) -> None:
        for path in self._paths(step) & self._left_of_file.keys():
            self._left_of_file[path] -= 1
            if self._left_of_file[path] == 0 and self._mine.hashes_input(path):
                self._schedule.add([self._job(path)], first=True)

    def _paths(self, step: Step) -> set[str]:
        places = ((self._plan.sources[operand.source], operand.tensor) for operand in step.operands)
        paths = {str(source.files[source.position(name)[0]].path) for source, name in places if source.files}
        return paths & self._files.keys()  # what recipes inside this one made is no input

    def _job(self, path: str) -> Job:
        stamp = self._files[path]
        if path in self._record.inputs:
            return Job(run=lambda: self._record.inputs[path], after=lambda _: None)
        return Job(run=partial(remembered_sha256, stamp.path), after=partial(self._hashed, path), hashes=True)

    def _hashed(self, path: str, digest: str) -> None:
        self._record.inputs[path] = digest
        self._journal.hashed(path, digest)

    def written(self, step: Step, start: int, stop: int) -> None:
        for slot in step.slots:
            place = self._plan.shards[slot.shard].header.slots[slot.spec.name].begin
            begin, end = step.span(slot, start, stop)
            self._outputs[slot.shard].add(place + begin, place + end)
            self._hash_output(slot.shard)

    def settle(self) -> None:
        self._settled = True
        for shard in range(len(self._outputs)):
            self._hash_output(shard)

    def _hash_output(self, shard: int) -> None:
        """Have an output file hashed as far as it is finished."""
        if self._plan.shards[shard].sparse:
            return
        if self._settled and self._mine.hashes_output(shard) and self._outputs[shard].take():
            run, after = partial(self._sync_and_hash, shard), partial(self._output_hashed, shard)
            self._schedule.add([Job(run=run, after=after, hashes=True)], first=True)

    def _sync_and_hash(self, shard: int) -> str | None:
        digest = self._outputs[shard].hash()
        if digest is not None:
            self._writer.sync(shard)
        return digest

    def _output_hashed(self, shard: int, digest: str | None) -> None:
        if digest is None:
            self._hash_output(shard)
        else:
            self._record.outputs[self._plan.shards[shard].name] = digest
