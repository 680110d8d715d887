"""A Hub of our own and the real client: commands run in processes whose environment points to it."""

import json

import pytest

from tests.files import tensors, write_model, write_recipe
from tests.forks import clean_environment
from tests.hub.server import TOKEN, Hub

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


@pytest.fixture
def hub(tmp_path):
    """A Hub that holds org/base, org/a and org/b."""
    server = Hub(tmp_path / "hub")
    for seed, name in enumerate(("base", "a", "b")):
        server.upload(f"org/{name}", model_folder(tmp_path / "made" / name, seed))
    yield server
    server.close()


@pytest.fixture
def call(hub, tmp_path, forks):
    """Run the command line in a process of its own. `env` changes its environment; `token` logs in."""

    def run(*arguments, token=None, cwd=tmp_path, **env):
        environment = clean_environment() | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "HF_HUB_ETAG_TIMEOUT": "60",
            **({"HF_TOKEN": token} if token else {}),
            **env,
        }
        done = forks.run(arguments, cwd=cwd, env=environment)
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
