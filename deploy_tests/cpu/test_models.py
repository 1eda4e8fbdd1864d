"""Networks by name, their weights, and what is said about names and files that will not do."""

import importlib.util
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from chip_deploy.pipeline.cifar_nets import OWN_NETS
from chip_deploy.pipeline.data import open_data
from chip_deploy.pipeline.models import (
    BuiltModel,
    build_model,
    import_object,
    input_size,
    known_models,
    load_weights,
)
from chip_deploy.pipeline.tune import evaluate

TIMM = importlib.util.find_spec("timm") is not None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where other programs share the cores, threads that wait for each other take many times as long as one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "published"), [("resnet20", 91.73), ("resnet56", 93.39)])
def test_published_weights_reach_the_published_accuracy(
    name: str, published: float, shared: Path, cifar10_test: Path
) -> None:
    built = build_model(name, num_classes=10, seed=0)
    load_weights(built.module, shared / "weights" / f"{name}.safetensors")
    data = open_data(f"imagefolder:{cifar10_test}", size=built.input_size, seed=0)

    accuracy = evaluate(built.module, data.test)

    assert accuracy.n == 10_000
    assert abs(100 * accuracy.top1 - published) <= 0.02, "two images may tip over on another CPU"


@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1"])
def test_the_same_seed_draws_the_same_weights_and_another_seed_does_not(name: str) -> None:
    first, again, other = (
        build_model(name, num_classes=3, seed=seed, size=64).module.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_building_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    build_model("resnet20", num_classes=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_built_models_are_in_evaluation_mode_and_say_what_they_are() -> None:
    built = build_model("torchvision:resnet18", num_classes=7, seed=0, size=32)
    assert not any(module.training for module in built.module.modules())
    assert (built.name, built.input_size, built.num_classes, built.layout) == (
        "torchvision:resnet18",
        32,
        7,
        "torchvision",
    )


def test_models_keep_their_own_classes_when_none_are_asked_for() -> None:
    assert build_model("resnet20", num_classes=None, seed=0).num_classes == 10
    assert build_model("mobilenet_v1", num_classes=None, seed=0, size=32).num_classes == 1000
    assert build_model("squeezenet1_1", num_classes=None, seed=0, size=64).num_classes == 1000


@pytest.mark.parametrize(("name", "size"), [("resnet56", 32), ("mobilenet_v1", 224), ("resnet18", 224)])
def test_input_size_is_known_by_name(name: str, size: int) -> None:
    assert input_size(name) == size


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out_and_inputs_scaled_as_the_published_weights_expect(name: str) -> None:
    module = build_model(name, num_classes=10, seed=0, size=128).module
    assert not [key for key in module.state_dict() if key.lower().startswith("aux")]
    assert vars(module)["transform_input"] is True


def test_a_name_that_torchvision_has_means_torchvisions_network() -> None:
    assert build_model("alexnet", num_classes=10, seed=0, size=64).layout == "torchvision"
    assert not {*OWN_NETS} & {*torchvision.models.list_models()}, "ours would never be built"


def test_every_name_that_is_listed_is_a_classification_network() -> None:
    names = known_models()
    assert {"resnet18", "resnet50", "resnet56", "alexnet", "alexnet_cifar", "convnext_tiny"} <= {*names}
    assert "fcn_resnet50" not in names


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnt56", "unknown model 'resnt56'. Did you mean 'resnet56'?"),
        ("torchvision:resnet5O", "unknown model 'torchvision:resnet5O'. Did you mean 'resnet50'?"),
        ("torchvision:resnet56", "unknown model 'torchvision:resnet56'."),
        ("fcn_resnet50", "any torchvision classification network"),
        ("", "unknown model ''."),
        ("no_such_package:build", "model 'no_such_package:build': no module 'no_such_package'."),
        ("os:pathh", "'pathh' is missing in os."),
        ("os:name", "'name' is not callable in os."),
        ("my nets:build", "expected package.module:name"),
        ("mynets:", "expected package.module:name"),
    ],
)
def test_unknown_models_are_refused_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build_model(name, num_classes=10, seed=0)


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model 'alexnet' cannot take a 32x32 RGB image: .+ \(data.size\)"):
        build_model("alexnet", num_classes=10, seed=0, size=32)


@pytest.mark.skipif(not TIMM, reason="timm is not installed")
def test_timm_networks_are_built_at_their_own_size() -> None:
    built = build_model("timm:resnet18", num_classes=5, seed=0, size=64)
    assert (built.num_classes, built.layout, input_size("timm:inception_v3")) == (5, "timm", 299)


@pytest.mark.skipif(not TIMM, reason="timm is not installed")
def test_unknown_timm_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'timm:resnet_18': .+ Did you mean 'resnet18'"):
        build_model("timm:resnet_18", num_classes=5, seed=0)


def test_without_timm_its_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    with pytest.raises(ValueError, match=r"model 'timm:resnet18': timm is not installed. Install it"):
        build_model("timm:resnet18", num_classes=5, seed=0)


FACTORIES = """
from torch import nn

def small(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

def fixed():
    return small(4)

fixed.input_size = 48

def greedy(**options):
    assert set(options) <= {"num_classes"}
    return small(**options)

def text():
    return "a network"

def two_heads():
    class Two(nn.Module):
        def forward(self, x):
            return x, x
    return Two()

def maps():
    return nn.Conv2d(3, 4, 1)
"""


def test_a_users_factory_is_found_in_the_current_directory_which_then_leaves_the_path(here: Path) -> None:
    (here / "c_nets_found.py").write_text(FACTORIES)
    before = list(sys.path)
    built = build_model("c_nets_found:small", num_classes=6, seed=0)
    assert (built.num_classes, built.layout, built.input_size) == (6, "user", 224)
    assert build_model("c_nets_found:greedy", num_classes=3, seed=0).num_classes == 3
    assert sys.path == before


def test_a_users_factory_may_fix_its_classes_and_its_size(here: Path) -> None:
    (here / "c_nets_fixed.py").write_text(FACTORIES)
    built = build_model("c_nets_fixed:fixed", num_classes=None, seed=0)
    assert (built.num_classes, built.input_size) == (4, 48)
    with pytest.raises(ValueError, match="'c_nets_fixed:fixed' has 4 outputs but 10 classes were asked for"):
        build_model("c_nets_fixed:fixed", num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("text", "the factory returned a str, not a torch.nn.Module"),
        ("two_heads", "expected one output of shape (images, classes), got tuple"),
        ("maps", "expected one output of shape (images, classes), got shape (1, 4, 224, 224)"),
        ("smal", "'smal' is missing in c_nets_odd. Did you mean 'small'?"),
    ],
)
def test_factories_that_give_no_classifier_are_refused(here: Path, factory: str, sentence: str) -> None:
    (here / "c_nets_odd.py").write_text(FACTORIES)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build_model(f"c_nets_odd:{factory}", num_classes=None, seed=0)


def test_modules_that_cannot_be_imported_say_why(here: Path) -> None:
    (here / "c_needs_more.py").write_text("import no_such_library")
    (here / "c_broken.py").write_text("def build(:")
    with pytest.raises(ValueError, match="importing it needs 'no_such_library', which is not installed"):
        import_object("c_needs_more:build", what="model")
    with pytest.raises(ValueError, match="cannot import 'c_broken': invalid syntax"):
        import_object("c_broken:build", what="model")


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def donor() -> dict[str, torch.Tensor]:
    """Weights that no freshly built resnet20 has."""
    return build_model("resnet20", num_classes=10, seed=99).module.state_dict()


def _saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def _params(built: BuiltModel) -> int:
    return sum(parameter.numel() for parameter in built.module.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "DataParallel", "compiled and parallel"],
)
def test_checkpoints_are_read_however_they_are_wrapped(wrap, donor: dict[str, torch.Tensor], tmp_path: Path) -> None:
    module = build_model("resnet20", num_classes=10, seed=0).module
    load_weights(module, _saved(wrap(donor), tmp_path / "x.pt"))
    assert all(torch.equal(value, donor[key]) for key, value in module.state_dict().items())


def test_safetensors_are_known_by_content_not_by_name(donor: dict[str, torch.Tensor], tmp_path: Path) -> None:
    module = build_model("resnet20", num_classes=10, seed=0).module
    save_file(donor, tmp_path / "weights.bin")
    load_weights(module, tmp_path / "weights.bin")
    assert torch.equal(module.state_dict()["linear.weight"], donor["linear.weight"])


def test_checkpoints_without_batch_counters_are_complete(donor: dict[str, torch.Tensor], tmp_path: Path) -> None:
    old = {key: value for key, value in donor.items() if not key.endswith("num_batches_tracked")}
    module = build_model("resnet20", num_classes=10, seed=0).module
    load_weights(module, _saved(old, tmp_path / "old.pt"))
    assert all(torch.equal(module.state_dict()[key], value) for key, value in old.items())


def test_auxiliary_heads_in_the_file_are_dropped(tmp_path: Path) -> None:
    module = build_model("googlenet", num_classes=10, seed=0, size=64).module
    state = {key: value + 1 for key, value in module.state_dict().items()}
    load_weights(module, _saved({**state, "aux1.fc1.weight": torch.zeros(2)}, tmp_path / "aux.pt"))
    assert torch.equal(module.state_dict()["fc.weight"], state["fc.weight"])


def test_weights_of_another_architecture_name_the_first_three_mismatches(tmp_path: Path) -> None:
    module = build_model("resnet18", num_classes=10, seed=0, size=32).module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    other = build_model("resnet20", num_classes=10, seed=0).module.state_dict()
    with pytest.raises(ValueError, match="do not fit ResNet") as refused:
        load_weights(module, _saved(other, tmp_path / "other.pt"))

    sentence = str(refused.value)
    assert "'conv1.weight' is (16, 3, 3, 3) in the file, (64, 3, 7, 7) in the model" in sentence
    assert "'bn1.weight' is (16,) in the file, (64,) in the model" in sentence
    assert "'bn1.bias'" in sentence
    assert "'bn1.running_mean'" not in sentence
    assert " more. Give the weights" in sentence
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_missing_and_unknown_tensors_are_named(donor: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {**donor, "extra.weight": torch.zeros(1)}
    del changed["linear.bias"]
    with pytest.raises(ValueError, match=r"'linear.bias' is missing in the file; 'extra.weight' is not in the model\."):
        load_weights(build_model("resnet20", num_classes=10, seed=0).module, _saved(changed, tmp_path / "x.pt"))


def test_missing_weights_are_reported_as_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights .*nowhere.pt: no such file"):
        load_weights(nn.Linear(1, 1), tmp_path / "nowhere.pt")


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    bomb = _saved({"conv1.weight": torch.zeros(1), "x": _Bomb(tmp_path / "crater")}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb.pt: refused, it holds more than tensors \(\w+.mkdir\)"):
        load_weights(nn.Linear(1, 1), bomb)
    assert not (tmp_path / "crater").exists()


def test_whole_pickled_models_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = build_model("resnet20", num_classes=10, seed=0).module
    with pytest.raises(ValueError, match=r"refused, .*CifarResNet.* Save the weights alone: torch.save"):
        load_weights(model, _saved(model, tmp_path / "model.pt"))


def test_files_that_are_no_checkpoints_are_refused(donor: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(donor, tmp_path / "whole.safetensors")
    whole_torch = _saved(donor, tmp_path / "whole.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    contents = {
        "empty.pt": b"",
        "text.pt": b"these are not weights",
        "half.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:5000],
        "half.pt": whole_torch[: len(whole_torch) // 2],
        "archive.pt": (tmp_path / "archive.pt").read_bytes(),
        "dict.pkl": pickle.dumps({"conv1.weight": 1}),
    }
    model = build_model("resnet20", num_classes=10, seed=0).module
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"not a checkpoint|damaged safetensors|refused") as refused:
            load_weights(model, tmp_path / name)
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "sentence"), [([1, 2], "found a list"), ({"epoch": 3}, "no tensors in it")])
def test_checkpoints_without_tensors_are_refused(content: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_weights(nn.Linear(1, 1), _saved(content, tmp_path / "x.pt"))


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this is a folder"):
        load_weights(nn.Linear(1, 1), tmp_path)
