"""Networks by name (ours, torchvision's, timm's, the user's own factory) and their weights."""

import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from .cifar_nets import IMAGENET_SIZE, OWN_NETS

# Shape letters: B images, K classes.

Layout = Literal["ours", "torchvision", "timm", "user"]

DEFAULT_SIZE = IMAGENET_SIZE

# torchvision builds these two with auxiliary classifiers for training. Their published weights expect inputs scaled to
# [-1, 1], which `transform_input` derives from ImageNet-normalised ones; without it those weights lose accuracy in
# silence. It holds no parameters, and a net trained from scratch is none the worse for it.
_AUX_NETS = ("googlenet", "inception_v3")
_AUX_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_NAME_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class BuiltModel:
    """A network in evaluation mode, with what the other stages need to know about it."""

    module: nn.Module
    name: str
    input_size: int
    num_classes: int
    layout: Layout


def known_models() -> list[str]:
    """The bare names that `--model` takes, sorted; `timm:NAME` and `package.module:factory` come on top."""
    return sorted({*OWN_NETS, *_torchvision_names()})


def input_size(name: str) -> int:
    """The side of the square images that the network of that name is made for, without building it.

    32 for our CIFAR nets, timm's own figure for timm's, 224 for our other one and torchvision's; a user's factory may
    carry an attribute `input_size`, else 224.

    Raises: ValueError as build_model does for an unknown name.
    """
    match _layout(name):
        case "ours":
            return OWN_NETS[name].size
        case "torchvision":
            return DEFAULT_SIZE
        case "timm":
            config = _timm(name).get_pretrained_cfg(_bare(name), allow_unregistered=False)
            return int(config.input_size[-1]) if config is not None else DEFAULT_SIZE
        case "user":
            return int(getattr(import_object(name, what="model"), "input_size", DEFAULT_SIZE))


def build_model(name: str, *, num_classes: int | None, seed: int, size: int | None = None) -> BuiltModel:
    """The network of that name with freshly drawn weights, in evaluation mode.

    Bare names are our own nets' or torchvision's (torchvision's where both have one); `torchvision:NAME` and
    `timm:NAME` say it aloud; `package.module:factory` is called with num_classes where it takes that. Without
    num_classes the network keeps its own number of classes. Auxiliary heads are left out. One image of `size` pixels
    (by default input_size(name)) is put through: what cannot run or has no single (B, K) output is refused here.
    The same seed draws the same weights; the global generator is left as it was.

    Raises: ValueError with the nearest name for an unknown one, or saying what does not fit.
    """
    layout = _layout(name)
    side = size if size is not None else input_size(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _construct(name, layout, num_classes).eval()
    outputs = _count_outputs(module, name=name, size=side)
    if num_classes is not None and outputs != num_classes:
        raise ValueError(
            f"model '{name}' has {outputs} outputs but {num_classes} classes were asked for. "
            "Let its factory take num_classes, or use data with as many classes."
        )
    return BuiltModel(module=module, name=name, input_size=side, num_classes=outputs, layout=layout)


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill the module from a checkpoint, every tensor of it; nothing is ever unpickled.

    Reads safetensors, or PyTorch files of tensors only. Unwraps {"state_dict": ...} and the like, strips the prefixes
    of DataParallel and torch.compile, and drops auxiliary heads that the module was built without.

    Raises: FileNotFoundError; ValueError for a file that is no checkpoint, that holds more than tensors, or that
    belongs to another architecture (naming the first three mismatches). The module is then unchanged.
    """
    path = Path(path)
    wanted = module.state_dict()
    found = _unwrap(_read_tensors(path), wanted, path=path)
    found = {key: value for key, value in found.items() if key in wanted or not key.startswith(_AUX_PREFIXES)}
    mismatches = _mismatches(found, wanted)
    if mismatches:
        more = f"; {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        raise ValueError(
            f"weights {path} do not fit {type(module).__name__}: {'; '.join(mismatches[:3])}{more}. "
            "Give the weights of this architecture, or the --model they belong to."
        )
    module.load_state_dict(found, strict=False)  # what is still missing are batch counters of old checkpoints


def import_object(name: str, *, what: str) -> Any:
    """The object that `package.module:attribute` names; the current directory is searched first, for this import only.

    Raises: ValueError saying which part is missing; `what` is what the user meant it for ("model", "data", ...).
    """
    module_name, _, attribute = name.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module_name) or not attribute.isidentifier():
        raise ValueError(f"{what} '{name}': expected package.module:name, for example mynets.small:build.")
    here = str(Path.cwd())
    importlib.invalidate_caches()  # the module may have been written a moment ago
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        own = err.name is not None and (module_name + ".").startswith(err.name + ".")
        why = f"no module '{err.name}'" if own else f"importing it needs '{err.name}', which is not installed"
        raise ValueError(f"{what} '{name}': {why}. Searched {here} and the installed packages.") from err
    except (ImportError, SyntaxError) as err:
        raise ValueError(f"{what} '{name}': cannot import '{module_name}': {err}.") from err
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        state = "is not callable" if hasattr(module, attribute) else "is missing"
        raise ValueError(f"{what} '{name}': '{attribute}' {state} in {module_name}.{nearest(attribute, names)}")
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest of the names, or nothing where none is close."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that the function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a callable that tells nothing about itself
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(offered)
    return {key: value for key, value in offered.items() if key in parameters}


# -- choosing and building ---------------------------------------------------------------------------------------------


def _layout(name: str) -> Layout:
    prefix, colon, _ = name.partition(":")
    if prefix == "timm" and colon:
        return "timm"
    if prefix == "torchvision" and colon:
        _require_known(_bare(name), _torchvision_names(), name=name)
        return "torchvision"
    if colon:
        return "user"
    if name in _torchvision_names():
        return "torchvision"
    _require_known(name, known_models(), name=name)
    return "ours"


def _require_known(bare: str, names: Iterable[str], *, name: str) -> None:
    names = list(names)
    if bare not in names:
        raise ValueError(
            f"unknown model '{name}'.{nearest(bare, names)} Models: {', '.join(OWN_NETS)}, any torchvision "
            "classification network, timm:NAME, or your own package.module:factory."
        )


def _bare(name: str) -> str:
    return name.rpartition(":")[2]


def _torchvision_names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)  # the classification networks only


def _timm(name: str) -> Any:
    """timm, once it is known to have that network."""
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"model '{name}': timm is not installed. Install it (pip install timm) or use another model.")
    timm = importlib.import_module("timm")
    bare = name.partition(":")[2]
    if not timm.is_model(bare):
        raise ValueError(f"unknown model '{name}': timm has none of that name.{nearest(bare, timm.list_models())}")
    return timm


def _construct(name: str, layout: Layout, num_classes: int | None) -> nn.Module:
    classes = {} if num_classes is None else {"num_classes": num_classes}
    match layout:
        case "ours":
            return OWN_NETS[name].build(num_classes)
        case "torchvision":
            bare = _bare(name)
            aux = {"aux_logits": False, "init_weights": False, "transform_input": True} if bare in _AUX_NETS else {}
            return torchvision_models.get_model(bare, weights=None, **aux, **classes)
        case "timm":
            return _timm(name).create_model(_bare(name), pretrained=False, **classes)
        case "user":
            factory = import_object(name, what="model")
            module = factory(**accepted(factory, classes))
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"model '{name}': the factory returned a {type(module).__name__}, not a torch.nn.Module."
                )
            return module


@torch.no_grad()
def _count_outputs(module: nn.Module, *, name: str, size: int) -> int:
    """K, from one black image put through."""
    try:
        output = module(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as err:
        reason = str(err).strip().split("\n")[0]
        raise ValueError(
            f"model '{name}' cannot take a {size}x{size} RGB image: {reason}. Set another size (data.size)."
        ) from err
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model '{name}': expected one output of shape (images, classes), got {got}.")
    return int(output.shape[1])


# -- reading checkpoints -----------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> Mapping[str, Any]:
    """Whatever mapping the file holds, tensors and plain containers only."""
    if not path.exists():
        raise FileNotFoundError(f"weights {path}: no such file.")
    if path.is_dir():
        raise ValueError(f"weights {path}: this is a folder; expected a .safetensors or .pt file.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":  # a header length, then JSON
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as err:
            raise ValueError(f"weights {path}: a damaged safetensors file ({err}).") from err
    if not head.startswith((b"PK", b"\x80")):  # torch.save writes a zip archive; before 1.6 it wrote pickles
        raise ValueError(f"weights {path}: not a checkpoint; expected safetensors or a file written by torch.save.")
    return _read_torch_file(path)


def _read_torch_file(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about TorchScript archives before refusing them
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        named = re.search(r"GLOBAL ([\w.]+)", str(err))
        what = f" ({named.group(1)})" if named else ""
        raise ValueError(
            f"weights {path}: refused, it holds more than tensors{what}, and nothing is unpickled here. "
            "Save the weights alone: torch.save(model.state_dict(), PATH), or safetensors."
        ) from err
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as err:
        reason = str(err).strip().split("\n")[0]
        raise ValueError(f"weights {path}: not a checkpoint that torch can read ({reason}).") from err
    if not isinstance(found, Mapping):
        raise ValueError(f"weights {path}: expected a state dict, found a {type(found).__name__}.")
    return found


def _unwrap(found: Mapping[str, Any], wanted: Mapping[str, Tensor], *, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"weights {path}: no tensors in it; expected a state dict.")
    for prefix in _NAME_PREFIXES:
        if all(key.startswith(prefix) for key in tensors) and not any(key.startswith(prefix) for key in wanted):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A sentence part per tensor that is missing, of another shape, or unknown; the model's own order first."""
    sentences = []
    for key, value in wanted.items():
        if key not in found:
            if not key.endswith(".num_batches_tracked"):
                sentences.append(f"'{key}' is missing in the file")
        elif found[key].shape != value.shape:
            sentences.append(f"'{key}' is {tuple(found[key].shape)} in the file, {tuple(value.shape)} in the model")
    return sentences + [f"'{key}' is not in the model" for key in found if key not in wanted]
