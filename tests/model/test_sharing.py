"""Where the parts of a model go when several GPUs share it, for checkpoints of every layout."""

import pytest
import torch

from llava.model import placement
from llava.model.builder import load_pretrained_model
from llava.model.export import export
from tests.model.checkpoint_tools import CHECKPOINT, NEXT
from tests.model.test_export import ask
from tests.second_device import SECOND, devices, place

LAYOUTS = ["llava", "llava-hf", "llava-next-hf"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    for name, source in (("llava-hf", CHECKPOINT), ("llava-next-hf", NEXT)):
        export(str(source), str(root / name), "llava-hf")
    return {
        "llava": CHECKPOINT,
        "llava-hf": root / "llava-hf",
        "llava-next-hf": root / "llava-next-hf",
    }


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretends that there are two GPUs, each with room for 0.7 of a model; returns what accelerate
    is asked to put where."""
    asked = []

    def memory(model, **_):
        return dict.fromkeys((0, 1), 0.7 * sum(p.nbytes for p in model.parameters()))

    def dispatch(model, device_map):
        asked.append(device_map)
        return model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "get_balanced_memory", memory)
    monkeypatch.setattr(placement, "dispatch_model", dispatch)
    monkeypatch.setattr(placement, "_fits", lambda model, device, packed: False)
    return asked


def load(folder, **options):
    return load_pretrained_model(str(folder), None, "llava", torch_dtype=torch.float32, **options)


@pytest.mark.parametrize("strategy", ["auto", "balanced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_stay_whole_and_every_weight_has_a_place(two_gpus, checkpoints, layout, strategy):
    model = load(checkpoints[layout], device_map=strategy)[1]
    (where,) = two_gpus
    assert set(where.values()) == {0, 1}
    for name, _ in model.named_parameters():
        assert sum(name == part or name.startswith(f"{part}.") for part in where) == 1, name
    layers = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
    whole = {part for part in where if part.startswith("model.layers.")}
    assert whole <= set(layers)


@pytest.mark.parametrize("layout, option", [("llava-hf", "auto"), ("llava-next-hf", "dict")])
def test_a_model_in_the_layout_of_transformers_says_on_two_devices_what_it_says_on_one(
    two_gpus, checkpoints, layout, option
):
    """Placed as accelerate was asked to, on pretended devices."""
    one = load(checkpoints[layout], device="cpu")
    expected = ask(one)[2]
    if option == "dict":
        names = [name for name, _ in one[1].named_children()]
        inner = [f"model.{name}" for name, _ in one[1].model.named_children()]
        parts = [*inner, *(name for name in names if name != "model")]
        given = {name: number % 2 for number, name in enumerate(parts)}
    loaded = load(checkpoints[layout], device_map=given if option == "dict" else "auto")
    (where,) = two_gpus
    for part, number in where.items():
        if str(number).endswith("1"):
            place(loaded[1].get_submodule(part), SECOND)
    with devices() as log:
        logits = ask(loaded)[2]
    assert log.copies
    torch.testing.assert_close(torch.as_tensor(logits.tolist()), expected, atol=2e-4, rtol=1e-4)
