"""Quantised models on the Hub: planned from headers where these tell the shapes, else fetched for the plan."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.files import write_recipe
from tests.hub.conftest import model_folder

NAME = "model.layers.0.mlp.weight"


def codes(folder, form):
    """A model whose one matrix is stored as codes; what these mean."""
    state = load_file(model_folder(folder, 1) / "model.safetensors")
    value = state[NAME].double()
    if form == "fp8":
        scale = (value.abs().max() / 448).float()
        state |= {NAME: (value / scale).float().to(torch.float8_e4m3fn), f"{NAME}_scale_inv": scale.reshape(1, 1)}
        meant = state[NAME].double() * scale
    else:
        table = torch.linspace(-1, 1, 16, dtype=torch.float64)
        scale = value.reshape(-1, 64).abs().amax(1).float()
        places = (value.reshape(-1, 64) / scale[:, None])[..., None].sub(table).abs().argmin(-1)
        meant = (table.float().double()[places] * scale[:, None]).reshape(value.shape)
        told = json.dumps({"shape": list(value.shape), "blocksize": 64}).encode()
        state |= {
            NAME: (16 * places.reshape(-1, 2)[:, :1] + places.reshape(-1, 2)[:, 1:]).to(torch.uint8),
            f"{NAME}.absmax": scale,
            f"{NAME}.quant_map": table.float(),
            f"{NAME}.quant_state.bitsandbytes__nf4": torch.tensor(list(told), dtype=torch.uint8),
        }
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": form}}))
    return meant


@pytest.mark.parametrize(("form", "needs_values"), [("fp8", False), ("bitsandbytes", True)])
def test_codes_are_planned_and_merged(hub, call, tmp_path, form, needs_values):
    meant = codes(tmp_path / "codes", form)
    hub.upload("org/codes", tmp_path / "codes")
    recipe = write_recipe(
        tmp_path / "codes.yaml", models={"a": "org/codes"}, merge={"method": "passthrough"}, output={"path": "out"}
    )
    planned = call("plan", recipe, "--json")
    assert planned.code == 0, planned.err
    assert (planned.answer["bytes_to_download"] == 0) == needs_values
    done = call("run", recipe)
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written[NAME].double(), meant, rtol=2e-7, atol=1e-9)
