"""A campaign of faults: kills, full disks, damaged and changing inputs, rivals, nonsense, and a Hub that fails.

    scripts/faults                 everything, some minutes; a table of what was tried and what was lost (nothing)
    scripts/faults --small         a little of everything
    scripts/faults --seed 7        other random moments

A loss is an output that is there and is not what an undisturbed run writes, an exit code that is none of ours, or a
secret in anything that was printed or written. Exits with 1 if there was any.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from mergetool.errors import RecipeError, SourceError
from mergetool.recipe import load_recipe
from mergetool.tensors.source import read_header
from tests.files import content, tensors, write_model, write_models, write_recipe
from tests.forks import Forks, clean_environment
from tests.hub.server import TOKEN, Doors, Hub

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("kills", "disks", "inputs", "rivals", "nonsense", "hub")
OURS = {*range(2, 9), 0}
LAYERS = 60
PERCEPTRON = {"fc1.weight": (32, 16), "fc1.bias": (32,), "fc2.weight": (24, 32), "fc2.bias": (24,)}
PERCEPTRON |= {"fc3.weight": (10, 24), "fc3.bias": (10,)}


class Campaign:
    """What was tried in one folder, and what came of it."""

    def __init__(self, folder: Path, seed: int, forks: Forks) -> None:
        self.folder = folder
        folder.mkdir()
        self.random = random.Random(seed)
        self.forks = forks
        self.rows: list[tuple[str, int, str, int]] = []
        self.printed: list[str] = []
        self.expected: dict[Path, tuple[dict, float]] = {}

    def row(self, what: str, ends: Counter, lost: int) -> None:
        told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
        self.rows.append((what, sum(ends.values()), told, lost))
        print(f"{what:<52} {sum(ends.values()):>5}  lost {lost:>2}  {told}", flush=True)

    def start(self, *arguments, **env):
        environment = clean_environment() | {key: str(value) for key, value in env.items()}
        return self.forks.start(["run", *arguments], cwd=self.folder, envs=[environment])

    def end(self, running):
        done = running.wait()[0]
        self.printed.append(done.out + done.err)
        return done

    def push(self, *arguments, **env):
        environment = clean_environment() | {key: str(value) for key, value in env.items()}
        return self.end(self.forks.start(["push", *arguments], cwd=self.folder, envs=[environment]))

    def run(self, *arguments, **env):
        return self.end(self.start(*arguments, **env))


# ---------------------------------------------------------------- runs that are disturbed


def blocks_of(num_layers: int) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{layer}.mlp.weight": (240, 256) for layer in range(num_layers)}


def recipes(campaign: Campaign, num_layers: int) -> dict[str, Path]:
    """A recipe of each kind of method."""
    write_models(campaign.folder / "blocks", shapes=blocks_of(num_layers), dtype=torch.bfloat16)
    write_models(campaign.folder / "nets", names=("x", "y", "z"), shapes=PERCEPTRON)
    blocks = {"base": "blocks/base", "models": {"a": "blocks/a", "b": "blocks/b"}}
    mean = {"recipe": {"models": {"a": "blocks/a", "b": "blocks/b"}, "merge": {"method": "linear"}}}
    mixed = {"base": "blocks/base", "models": {"mix": mean, "b": "blocks/b"}}
    nets = {"models": {name: f"nets/{name}" for name in "xyz"}, "architecture": "mlp"}
    made = {
        "element (dare-ties)": (blocks, {"method": "dare-ties", "density": 0.4}),
        "tensor (tsv-merge)": (blocks, {"method": "tsv-merge"}),
        "fitted (c2m3)": (nets, {"method": "c2m3"}),
        "merge of merges (linear, ties)": (mixed, {"method": "ties"}),
    }
    output = {"shard_size": f"{50 * num_layers}KB"}
    return {
        name: write_recipe(campaign.folder / f"{number}.yaml", **models, merge=merge, output=output)
        for number, (name, (models, merge)) in enumerate(made.items())
    }


def expected(campaign: Campaign, recipe: Path) -> tuple[dict, float]:
    """What an undisturbed run writes, and how long it takes."""
    if recipe in campaign.expected:
        return campaign.expected[recipe]
    first = () if campaign.expected else (f"{recipe.stem}.first",)  # it takes far longer
    for output in (*first, f"{recipe.stem}.expected"):
        begun = time.monotonic()
        done = campaign.run(recipe, "-o", output)
        assert done.code == 0, done.err
        seconds = time.monotonic() - begun
    campaign.expected[recipe] = content(campaign.folder / f"{recipe.stem}.expected"), seconds
    return campaign.expected[recipe]


def kills(campaign: Campaign, name: str, recipe: Path, count: int) -> None:
    """SIGKILL at random moments; the same command until the output is there."""
    wanted, seconds = expected(campaign, recipe)
    output = campaign.folder / "killed"
    ends: Counter = Counter()
    lost = 0
    while ends["killed"] < count:
        running = campaign.start(recipe, "-o", output)
        time.sleep(campaign.random.uniform(0, 1.1 * seconds))
        with suppress(ProcessLookupError):
            os.kill(running.pids[0], signal.SIGKILL)
        done = campaign.end(running)
        ends["killed" if done.code == -signal.SIGKILL else "finished before"] += 1
        seconds *= 1.0 if done.code else 0.8  # most moments shall fall into the run
        lost += done.code not in (0, -signal.SIGKILL)
        if output.exists():
            lost += content(output) != wanted
            shutil.rmtree(output)
    done = campaign.run(recipe, "-o", output)
    lost += done.code != 0 or content(output) != wanted
    shutil.rmtree(output)
    campaign.row(f"kill -9, {name}", ends, lost)


def changing_inputs(campaign: Campaign, recipe: Path, num_layers: int, count: int) -> None:
    """An input that is truncated, rewritten, or taken away at a random moment of the run."""
    wanted, seconds = expected(campaign, recipe)
    victim, kept = campaign.folder / "blocks" / "a" / "model.safetensors", campaign.folder / "kept"
    shutil.copy2(victim, kept)

    def shorten():
        os.truncate(victim, campaign.random.randrange(victim.stat().st_size))

    def rewrite():
        write_model(victim.parent, tensors(99, blocks_of(num_layers), torch.bfloat16))

    ends: Counter = Counter()
    lost = 0
    for number in range(count):
        act = (shorten, rewrite, victim.unlink)[number % 3]
        output = campaign.folder / f"changed-{number}"
        running = campaign.start(recipe, "-o", output)
        time.sleep(campaign.random.uniform(0, seconds))
        act()
        done = campaign.end(running)
        if victim.exists():
            victim.unlink()
        shutil.copy2(kept, victim)
        ends["refused" if done.code else "finished"] += 1
        seconds *= 1.0 if done.code else 0.7  # most moments shall fall into the run
        lost += done.code not in OURS
        if done.code:
            lost += output.exists()
        else:  # it had been read, or had not been begun: then the lock tells which file that was
            verified = campaign.forks.run(["verify", output], cwd=campaign.folder, env=clean_environment())
            lost += verified.code != 0 or (act is not rewrite and content(output) != wanted)
    campaign.row("inputs that change or vanish during the run", ends, lost)


def damaged_inputs(campaign: Campaign, recipe: Path, count: int) -> None:
    """Inputs that cannot be read as they should: cut off, a folder or a dead link in their place, random bytes."""
    victim = campaign.folder / "blocks" / "b" / "model.safetensors"
    data = victim.read_bytes()

    def folder():
        victim.mkdir()

    def dead_link():
        victim.symlink_to("nowhere")

    def cut():
        victim.write_bytes(data[: campaign.random.randrange(len(data))])

    def noise():
        victim.write_bytes(campaign.random.randbytes(5000))

    def unreadable():
        victim.symlink_to("/proc/self/mem")  # a read answers EIO

    def no_number():
        spoilt = bytearray(data)
        place = len(data) - 2 * campaign.random.randrange(1, 1000)
        spoilt[place : place + 2] = b"\xc0\x7f"
        victim.write_bytes(spoilt)

    ends: Counter = Counter()
    lost = 0
    for number in range(count):
        victim.unlink()
        (cut, noise, folder, dead_link, unreadable, no_number)[number % 6]()
        done = campaign.run(recipe, "-o", "damaged")
        ends[f"exit {done.code}"] += 1
        lost += done.code not in (3, 5) or (campaign.folder / "damaged").exists()
        victim.rmdir() if victim.is_dir() else victim.unlink()
        victim.write_bytes(data)
    campaign.row("inputs that are damaged or cannot be read", ends, lost)


def rivals(campaign: Campaign, recipe: Path, count: int) -> None:
    """Two runs of one output at the same time."""
    wanted, _ = expected(campaign, recipe)
    ends: Counter = Counter()
    lost = 0
    for number in range(count):
        output = campaign.folder / f"rivals-{number}"
        both = campaign.forks.start(["run", recipe, "-o", output], cwd=campaign.folder, envs=[clean_environment()] * 2)
        codes = sorted(each.code for each in both.wait())
        known = {(0, 6): "one wrote, one was refused", (0, 0): "one wrote, one found it done"}
        ends[known.get(tuple(codes), f"exits {codes}")] += 1
        lost += tuple(codes) not in known or content(output) != wanted
    campaign.row("two runs on one output", ends, lost)


def full_disks(campaign: Campaign, recipe: Path, count: int) -> None:
    """No file may grow beyond some size: at the start, while filling, at the last small files."""
    wanted, _ = expected(campaign, recipe)
    largest = max(len(data) for data in wanted.values())
    ends: Counter = Counter()
    lost = 0
    for number in range(count):
        output = campaign.folder / f"full-{number}"
        limit = campaign.random.choice((largest // 7, largest - 1, 700, 100))
        env, unlimited = clean_environment() | {"LARGEST": str(limit)}, {"out": os.devnull, "err": os.devnull}
        (done,) = campaign.forks.start(
            ["run", recipe, "-o", output], cwd=campaign.folder, envs=[env], **unlimited
        ).wait()
        ends[f"exit {done.code}"] += 1
        lost += done.code != 6 or output.exists()
        again = campaign.run(recipe, "-o", output)
        lost += again.code != 0 or content(output) != wanted
    campaign.row("a disk that takes no more, then room again", ends, lost)


def small_disks(campaign: Campaign, recipe: Path, count: int) -> None:
    """A disk of its own (tmpfs, which only root may make) that is too small, or filled by somebody else meanwhile."""
    wanted, seconds = expected(campaign, recipe)
    size = sum(len(data) for data in wanted.values())
    disk = campaign.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        print("a full disk: only root may make one", flush=True)
        return
    ends: Counter = Counter()
    lost = 0
    try:
        for number in range(count):
            room = size // 1024 + 64
            room = campaign.random.randrange(room // 8, room) if number % 2 else 2 * room
            subprocess.run(["mount", "-o", f"remount,size={room}k", disk], check=True)
            running = campaign.start(recipe, "-o", disk / "out")
            if number % 2 == 0:
                time.sleep(campaign.random.uniform(0.2, 0.8) * seconds)
                with suppress(OSError):
                    (disk / "filler").write_bytes(bytes(4 * size))
            done = campaign.end(running)
            ends[f"exit {done.code}"] += 1
            lost += done.code not in (0, 6) or (done.code == 6) is (disk / "out").exists()
            (disk / "filler").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            again = campaign.run(recipe, "-o", disk / "out") if done.code else done
            lost += again.code != 0 or content(disk / "out") != wanted
            shutil.rmtree(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)
    campaign.row("a full disk, then room again", ends, lost)


# ---------------------------------------------------------------- nonsense


def fuzzed_headers(campaign: Campaign, count: int) -> None:
    """Bytes of a sound file changed, cut, doubled: refused as damaged, or sound after all."""
    sound = write_model(campaign.folder / "sound", tensors(0)) / "model.safetensors"
    data = sound.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path = campaign.folder / "fuzzed.safetensors"
    ends: Counter = Counter()
    lost = 0
    for _ in range(count):
        path.write_bytes(mutated(campaign.random, data, length))
        try:
            read_header(path)
            ends["sound"] += 1
        except SourceError:
            ends["refused"] += 1
        except Exception as error:
            ends[type(error).__name__] += 1
            lost += 1
    campaign.row("fuzzed headers", ends, lost)


def fuzzed_recipes(campaign: Campaign, count: int) -> None:
    """Letters and lines of recipes changed: refused with a place, or a recipe after all."""
    texts = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    path = campaign.folder / "fuzzed.yaml"
    ends: Counter = Counter()
    lost = 0
    for _ in range(count):
        text = campaign.random.choice(texts)
        path.write_bytes(mutated(campaign.random, text, len(text)))
        try:
            load_recipe(path)
            ends["valid"] += 1
        except RecipeError as error:
            ends["refused"] += 1
            lost += not all(problem.where and problem.what for problem in error.problems)
        except Exception as error:
            ends[type(error).__name__] += 1
            lost += 1
    campaign.row("fuzzed recipes", ends, lost)


def mutated(rng: random.Random, data: bytes, length: int) -> bytes:
    """`data` with one to four changes in its first `length` bytes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(max(1, min(length, len(found))))
        kind = rng.randrange(6)
        if kind == 0:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[place : place + 1] = rng.choice(
                (b"{", b"}", b"[", b'"', b":", b",", b"-", b"9" * 20, b"\xff", b"\n", b"&a ")
            )
        elif kind == 2:
            del found[place : place + rng.randint(1, 30)]
        elif kind == 3:
            found[place:place] = found[place : place + rng.randint(1, 60)]
        elif kind == 4:
            found[place:place] = rng.randbytes(rng.randint(1, 8))
        elif rng.random() < 0.1:
            del found[place:]
        if not found:
            break
    return bytes(found)


# ---------------------------------------------------------------- the Hub


ANSWERS = (401, 429, ("stall", 8), 404, 500, ("cut", 10))


def failing_hub(campaign: Campaign, count: int) -> None:
    """A Hub that answers 401, 404, 429 or 500, stalls, or cuts: at every kind of request, reading and writing."""
    doors = Doors()
    hub = Hub(campaign.folder / "hub", doors)
    try:
        for name in "ab":
            folder = write_model(campaign.folder / "made" / name, tensors(ord(name), {"w": (60, 64)}), config={})
            hub.upload(f"org/{name}", folder)
        models = {"a": "org/a", "b": "org/b"}
        recipe = write_recipe(campaign.folder / "hub.yaml", models=models, merge={"method": "linear"})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_TELEMETRY": 1, "HF_TOKEN": TOKEN}
        env |= {"HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_HUB_ETAG_TIMEOUT": 1, "HASTE": 50}
        done = campaign.run(recipe, "-o", "hub.expected", HF_HOME=campaign.folder / "hf", **env)
        assert done.code == 0, done.err
        wanted = content(campaign.folder / "hub.expected")
        for answer in ANSWERS if count > 1 else ANSWERS[-3:]:
            ends, lost = _troubled(campaign, hub, recipe, (answer, env, wanted), count)
            campaign.row(
                f"a Hub that answers {answer}" if isinstance(answer, int) else f"a Hub: {answer[0]}", ends, lost
            )
    finally:
        doors.close()


def _troubled(campaign: Campaign, hub: Hub, recipe: Path, case: tuple, count: int) -> tuple[Counter, int]:
    answer, env, wanted = case
    places = [("GET", "/api/models/org/b"), ("GET", "cdn/files"), ("HEAD", "/resolve/"), ("POST", "/commit/")]
    places += [("PUT", "cdn/upload"), ("POST", "/preupload/")]
    ends: Counter = Counter()
    lost = 0
    for number in range(count):
        method, pattern = places[number % len(places)]
        home, output = (
            campaign.folder / f"hf-{len(campaign.printed)}",
            campaign.folder / f"pulled-{len(campaign.printed)}",
        )
        target = f"me/r{len(campaign.printed)}"
        hub.create(target)
        before, commits = hub.refs(target), len(hub.log(target))
        options = ("-o", output, "--set", f"output.hub.repo={target}", "--push")
        with hub.trouble(method, pattern, answer, times=campaign.random.choice((1, 1, 99))):
            done = campaign.run(recipe, *options, HF_HOME=home, **env)
        ends[f"exit {done.code}"] += 1
        lost += done.code not in (0, 8) or (done.code == 8) is (hub.refs(target) != before)
        lost += output.exists() and content(output) != wanted
        if output.exists():  # an interrupted push is finished by the next, and one after that has nothing to do
            pushed = [campaign.push(output, target, HF_HOME=home, **env) for _ in range(2)]
        else:
            pushed = [campaign.run(recipe, *options, HF_HOME=home, **env) for _ in range(1)]
        lost += any(each.code for each in pushed) or content(output) != wanted
        lost += len(hub.log(target)) != commits + 1 or "model.safetensors" not in hub.files(target)
    return ends, lost


def secrets(campaign: Campaign) -> None:
    """No token and no signature in what was printed, nor in any file but the Hub's own."""
    found = sum(TOKEN in text or "SIGNED" in text for text in campaign.printed)
    files = [path for path in campaign.folder.rglob("*") if path.is_file()]
    found += sum(TOKEN.encode() in path.read_bytes() or b"SIGNED-" in path.read_bytes() for path in files)
    ends = Counter({"outputs": len(campaign.printed), "files": len(files)})
    campaign.row("searched for the token and for signatures", ends, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a little of everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor() as pool:
        here, hub = (Campaign(Path(place) / name, options.seed, Forks()) for name in ("here", "hub"))
        try:
            waiting = pool.submit(failing_hub, hub, 1 if options.small else 6) if "hub" in options.only else None
            local_faults(here, options.only, *(SMALL if options.small else (LAYERS, 50, 15, 1000)))
            if waiting:  # mostly for answers, which is why both are tried at once
                waiting.result()
            lost = summed(here, hub)
        finally:
            for campaign in (here, hub):
                campaign.forks.close()
    sys.exit(lost > 0)


SMALL = (8, 1, 2, 60)
"""Layers, kills, other faults and fuzzed files, where there shall be few."""


def small_campaign(folder: Path, forks: Forks) -> int:
    """A little of everything, with no process but these; what was lost."""
    here, hub = (Campaign(folder / name, 0, forks) for name in ("here", "hub"))
    local_faults(here, PARTS, *SMALL)
    failing_hub(hub, 1)
    return summed(here, hub)


def summed(*campaigns: Campaign) -> int:
    """Look for secrets, and tell what was lost in all."""
    for campaign in campaigns:
        secrets(campaign)
    count = sum(row[1] for campaign in campaigns for row in campaign.rows[:-1])
    lost = sum(row[3] for campaign in campaigns for row in campaign.rows)
    print(f"\n{count} faults, {lost} lost")
    return lost


def local_faults(
    campaign: Campaign, parts: Sequence[str], num_layers: int, num_kills: int, num_others: int, num_fuzzed: int
) -> None:
    """All that needs no Hub."""
    made = recipes(campaign, num_layers)
    element = next(iter(made.values()))
    if "kills" in parts:
        for name, recipe in made.items():
            kills(campaign, name, recipe, num_kills)
    if "disks" in parts:
        full_disks(campaign, element, max(2, num_others // 3))
        small_disks(campaign, element, num_others)
    if "inputs" in parts:
        damaged_inputs(campaign, element, num_others + 3)
        changing_inputs(campaign, element, num_layers, num_others)
    if "rivals" in parts:
        rivals(campaign, element, num_others)
    if "nonsense" in parts:
        fuzzed_headers(campaign, num_fuzzed)
        fuzzed_recipes(campaign, num_fuzzed)


if __name__ == "__main__":
    main()
