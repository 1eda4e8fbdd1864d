"""Laws that a reader of the source can check: who may import what, and what no file may contain.

Every law has a twin: a planted violation that the same check must find.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("chip", "export", "pipeline")
PRUNERS = {"BasePruner", "MetaPruner", "MagnitudePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"}
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
TORCH = ("torch", "torchvision")

# Library -> the only files that may import it, anywhere in the three folders.
HOMES = {
    "torch_pruning": {"chip/groups.py", "chip/surgery.py"},
    "tensorrt": {"export/target_trt.py"},
    "tensorrt_rtx": {"export/target_trt.py"},
    "onnxruntime": {"export/target_ort.py", "export/ort_session.py", "export/precision.py", "export/quantize.py"},
}
TORCH_IN_EXPORT = {"export/onnx_export.py", "export/target_torch.py"}


def imported_modules(tree: ast.AST, file: str) -> Iterator[str]:
    """Absolute names of all that a file imports, at its top or inside functions; relative names are resolved."""
    package = ["chip_deploy", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def wrong_imports(file: str, source: str) -> list[str]:
    """What `file` imports against the plan of the house."""
    wing = file.split("/")[0]
    found = []
    for module in imported_modules(ast.parse(source), file):
        top = module.split(".")[0]
        if top in WINGS:
            found.append(f"{file} imports the bare name {module}")
        if top in HOMES and file not in HOMES[top]:
            found.append(f"{file} imports {module}")
        if wing == "export" and top in TORCH and file not in TORCH_IN_EXPORT:
            found.append(f"{file} imports {module}")
        for other in {"chip": ("export", "pipeline"), "export": ("chip", "pipeline")}.get(wing, ()):
            if module == f"chip_deploy.{other}" or module.startswith(f"chip_deploy.{other}."):
                found.append(f"{file} imports {module}")
    return found


def pruners(file: str, source: str) -> list[str]:
    """Uses of torch-pruning's own pruners, which leak models and ignore bad ratios in silence."""
    return [f"{file}: {name}" for name in _names(ast.parse(source)) if name in PRUNERS]


def blind_excepts(file: str, source: str) -> list[str]:
    """`except:`, `except Exception` and `except BaseException`, which only the command line may have.

    One that tidies up and raises again swallows nothing, and is let pass.
    """
    if file == "pipeline/cli.py":
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = set(_names(node.type)) if node.type else {"Exception"}
            if caught & {"Exception", "BaseException"} and ast.unparse(node.body[-1]) != "raise":
                found.append(f"{file}:{node.lineno}")
    return found


def unpickling(file: str, source: str) -> list[str]:
    """Ways to run code from a file: the pickle modules (their errors may be caught), torch.load without its guard."""
    tree = ast.parse(source)
    found = [
        f"{file} imports {name}"
        for name in imported_modules(tree, file)
        if name.split(".")[0] in PICKLERS or (name.startswith("pickle.") and name != "pickle.UnpicklingError")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            found.append(f"{file}:{node.lineno} uses pickle.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords)
            found += [] if safe else [f"{file}:{node.lineno} calls torch.load without weights_only=True"]
    return found


def undocumented(file: str, source: str) -> list[str]:
    """Public modules, classes and functions whose docstring is missing, or whose first paragraph is no sentence."""
    found = []
    for name, node in _public(ast.parse(source), file):
        text = ast.get_docstring(node) or ""
        first = text.split("\n\n")[0].strip()
        if not first or first[-1] not in ".?!" or " " not in first:
            found.append(f"{file}: {name}: {first!r}")
    return found


def unfinished(file: str, source: str) -> list[str]:
    """Notes of work left undone, and functions that raise NotImplementedError."""
    marks = re.findall(r"#.*\b(?:TODO|FIXME|XXX|HACK)\b", source)
    return [f"{file}: {mark}" for mark in marks] + [
        f"{file}: {name}" for name in _names(ast.parse(source)) if name == "NotImplementedError"
    ]


LAWS: list[Callable[[str, str], list[str]]] = [
    wrong_imports,
    pruners,
    blind_excepts,
    unpickling,
    undocumented,
    unfinished,
]

# Law, file, source with a violation that the law must find.
PLANTED = [
    (wrong_imports, "chip/plan.py", "from ..export.bundle import write_atomic"),
    (wrong_imports, "chip/plan.py", "from .. import export"),
    (wrong_imports, "chip/plan.py", "def late():\n    from ..pipeline import recipe"),
    (wrong_imports, "export/gate.py", "from chip_deploy.chip.plan import PrunePlan"),
    (wrong_imports, "export/gate.py", "import chip_deploy.pipeline.report"),
    (wrong_imports, "chip/plan.py", "import torch_pruning as tp"),
    (wrong_imports, "pipeline/stages.py", "from torch_pruning.utils import count_ops_and_params"),
    (wrong_imports, "export/target_ort.py", "import tensorrt"),
    (wrong_imports, "pipeline/stages.py", "import importlib\nimportlib.import_module('tensorrt_rtx')"),
    (wrong_imports, "export/agree.py", "def late():\n    import onnxruntime"),
    (wrong_imports, "export/agree.py", "from torch import Tensor"),
    (wrong_imports, "export/measure.py", "import torchvision.models"),
    (wrong_imports, "pipeline/stages.py", "import chip"),
    (wrong_imports, "pipeline/stages.py", "from export.bundle import write_atomic"),
    (pruners, "chip/surgery.py", "import torch_pruning as tp\ntp.pruner.BasePruner(model)"),
    (pruners, "chip/surgery.py", "from torch_pruning import MagnitudePruner"),
    (blind_excepts, "chip/plan.py", "try:\n    cut()\nexcept Exception:\n    pass"),
    (blind_excepts, "chip/plan.py", "try:\n    cut()\nexcept (OSError, BaseException):\n    pass"),
    (blind_excepts, "chip/plan.py", "try:\n    cut()\nexcept:\n    pass"),
    (unpickling, "pipeline/models.py", "import pickle\npickle.loads(data)"),
    (unpickling, "pipeline/models.py", "from pickle import Unpickler"),
    (unpickling, "pipeline/models.py", "from joblib import load"),
    (unpickling, "pipeline/models.py", "torch.load(path)"),
    (unpickling, "pipeline/models.py", "torch.load(path, weights_only=False)"),
    (undocumented, "chip/plan.py", "x = 1"),
    (undocumented, "chip/plan.py", '"""A plan."""\ndef cut():\n    pass'),
    (undocumented, "chip/plan.py", '"""A plan."""\nclass Plan:\n    """cut without a sentence"""'),
    (undocumented, "chip/plan.py", '"""A plan."""\nclass Plan:\n    """A plan."""\n    def cut(self): ...'),
    (unfinished, "chip/plan.py", "x = 1  # TO" + "DO: the rest"),
    (unfinished, "chip/plan.py", "def cut():\n    raise NotImplementedError"),
]

ALLOWED = [
    (wrong_imports, "chip/groups.py", "import torch_pruning as tp"),
    (wrong_imports, "export/target_trt.py", "def late():\n    import tensorrt_rtx"),
    (wrong_imports, "export/onnx_export.py", "import torch"),
    (wrong_imports, "pipeline/stages.py", "from ..chip.plan import PrunePlan\nfrom ..export import bundle"),
    (wrong_imports, "export/gate.py", "from .bundle import verify_bundle"),
    (blind_excepts, "pipeline/cli.py", "try:\n    run()\nexcept Exception:\n    pass"),
    (blind_excepts, "chip/plan.py", "try:\n    cut()\nexcept OSError:\n    pass"),
    (blind_excepts, "chip/plan.py", "try:\n    cut()\nexcept BaseException:\n    tidy()\n    raise"),
    (unpickling, "pipeline/models.py", "torch.load(path, weights_only=True)"),
    (unpickling, "pipeline/models.py", "import pickle\ntry:\n    load()\nexcept pickle.UnpicklingError:\n    pass"),
    (undocumented, "chip/plan.py", '"""A plan."""\ndef _cut():\n    pass'),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_source_keeps_the_law(law: Callable[[str, str], list[str]]) -> None:
    files = [path for wing in WINGS for path in sorted((ROOT / wing).rglob("*.py"))]
    assert {path.parent.name for path in files} == set(WINGS)
    found = [line for path in files for line in law(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("law", "file", "source"), PLANTED, ids=lambda part: getattr(part, "__name__", None))
def test_a_planted_violation_is_found(law: Callable[[str, str], list[str]], file: str, source: str) -> None:
    assert law(file, source)


@pytest.mark.parametrize(("law", "file", "source"), ALLOWED, ids=lambda part: getattr(part, "__name__", None))
def test_what_is_allowed_is_let_pass(law: Callable[[str, str], list[str]], file: str, source: str) -> None:
    assert not law(file, source)


def test_every_law_has_a_planted_violation() -> None:
    assert {law for law, _, _ in PLANTED} == set(LAWS)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public(tree: ast.Module, file: str) -> Iterator[tuple[str, Documented]]:
    yield file, tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for inner in methods:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and _is_public_method(inner):
                    yield f"{node.name}.{inner.name}", inner


def _is_public_method(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A property without a body is none: it is how a protocol says that a field is there, and read-only."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    is_field = decorators == ["property"] and ast.unparse(node.body[-1]) == "..."
    return not node.name.startswith("_") and not is_field
