"""What the queue hands out: order, memory, and hashing beside computing."""

import threading
from threading import Barrier

import pytest

from mergetool.engine.schedule import Job, Schedule


def ran(schedule, jobs, threads=1):
    """Run all jobs with so many threads."""
    schedule.add(jobs)
    schedule.close()
    workers = [threading.Thread(target=schedule.work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    if schedule.error is not None:
        raise schedule.error


def noted(names):
    """A maker of jobs that write their name down when they run."""

    def make(name, **options):
        return Job(run=lambda: names.append(name), after=lambda _: None, **options)

    return make


def test_jobs_run_in_the_order_in_which_they_were_queued():
    names = []
    make = noted(names)
    ran(Schedule(0, 1), [make(i) for i in range(5)])
    assert names == list(range(5))


def test_while_one_thread_computes_another_hashes():
    """Both kinds meet at a barrier; two of one kind would wait for ever."""
    meeting = Barrier(2)

    def meet():
        meeting.wait(60)

    computing = [Job(run=meet, after=lambda _: None) for _ in range(5)]
    hashing = [Job(run=meet, after=lambda _: None, hashes=True) for _ in range(5)]
    ran(Schedule(0, 2), [*hashing, *computing], threads=2)


def test_with_nothing_to_compute_every_thread_hashes():
    meeting = Barrier(4)
    hashing = [Job(run=lambda: meeting.wait(60), after=lambda _: None, hashes=True) for _ in range(8)]
    ran(Schedule(0, 4), hashing, threads=4)


def test_with_nothing_left_to_hash_every_thread_computes():
    meeting = Barrier(4)
    ran(Schedule(0, 4), [Job(run=lambda: meeting.wait(60), after=lambda _: None) for _ in range(8)], threads=4)


def test_jobs_that_do_not_fit_in_memory_together_run_one_by_one():
    running = []

    def alone():
        running.append(1)
        assert len(running) == 1
        running.pop()

    ran(Schedule(100, 4), [Job(run=alone, after=lambda _: None, memory=60) for _ in range(200)], threads=4)


def test_a_job_larger_than_the_memory_runs_though_others_hash():
    names = []
    make = noted(names)
    ran(Schedule(1, 2), [make("hash", hashes=True), make("large", memory=100)], threads=2)
    assert sorted(names) == ["hash", "large"]


def test_the_first_error_ends_everything():
    names = []

    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ran(Schedule(0, 1), [Job(run=fail, after=lambda _: None), noted(names)("never")])
    assert names == []
