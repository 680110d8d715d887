"""A Hub of our own and the real client: commands run in processes whose environment points to it."""

import json
from pathlib import Path

import pytest

from tests.conftest import COMMON_PATH
from tests.files import tensors, write_model, write_recipe
from tests.forks import Forks, clean_environment
from tests.hub.server import TOKEN, Doors, Hub

SHAPES = {"model.embed_tokens.weight": (48, 32), "model.layers.0.mlp.weight": (32, 32), "lm_head.weight": (48, 32)}
HASTY = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HASTE": "50"}
"""The environment of whoever is not patient with a Hub that does not answer, nor between two attempts."""
CARD = "---\nlicense: {}\n---\n\n# A model\n"


def model_folder(folder, seed, licence="apache-2.0"):
    """A small model with its config, tokenizer and card; its weights are large enough for the Hub's large files."""
    write_model(folder, tensors(seed, SHAPES), config={"model_type": "toy", "torch_dtype": "float32"})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text(CARD.format(licence))
    (folder / "training_args.bin").write_bytes(b"no use to anybody" * 1000)
    return folder


@pytest.fixture(scope="session")
def doors():
    """Where the Hub of each test is reached: the client of commands is told once."""
    made = Doors()
    yield made
    made.close()


@pytest.fixture
def hub(tmp_path, doors):
    """A Hub that holds org/base, org/a and org/b."""
    server = Hub(tmp_path / "hub", doors)
    for seed, name in enumerate(("base", "a", "b")):
        server.upload(f"org/{name}", model_folder(tmp_path / "made" / name, seed))
    return server


@pytest.fixture(scope="session")
def environment(doors, tmp_path_factory):
    """What commands are told of the Hub, and where they keep its files: that leads to a folder of the test."""
    return clean_environment() | {
        "HF_ENDPOINT": doors.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hub") / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "HF_HUB_ETAG_TIMEOUT": "60",
    }


@pytest.fixture(scope="session")
def near_hub(environment):
    """Processes that have imported the client where the environment is this one."""
    server = Forks(COMMON_PATH)
    server.live_in(environment)
    yield server
    server.close()


@pytest.fixture
def home(environment, tmp_path):
    """Where this test's commands keep what is fetched."""
    place = Path(environment["HF_HOME"])
    (tmp_path / "hf").mkdir()
    place.symlink_to(tmp_path / "hf")
    yield place
    place.unlink()


@pytest.fixture
def call(hub, environment, home, tmp_path, near_hub):
    """Run the command line in a process of its own. `env` changes its environment; `token` logs in."""

    def run(*arguments, token=None, cwd=tmp_path, **env):
        told = {**environment, **({"HF_TOKEN": token} if token else {}), **env}
        done = near_hub.run(arguments, cwd=cwd, env=told)
        assert TOKEN not in done.out + done.err
        assert "SIGNED" not in done.out + done.err
        done.answer = json.loads(done.out) if "--json" in arguments and done.out else None
        return done

    return run


@pytest.fixture
def recipe(tmp_path):
    """A recipe that averages org/a and org/b."""
    return write_recipe(
        tmp_path / "recipe.yaml",
        models={"a": "org/a", "b": "org/b"},
        merge={"method": "linear"},
        output={"path": "out"},
    )
