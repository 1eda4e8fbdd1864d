"""A torch program is read before torch reads it: plain tensors and operator calls pass, whatever could run does not."""

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chip_deploy.export.program_file import plain_copy, require_plain_program
from chip_deploy.export.target_torch import write_program

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    write_program(net, torch.zeros(2, 3, 8, 8), path, dynamic_batch=True)
    return path


def changed(program: Path, changes: dict[str, Callable[[bytes], bytes]]) -> io.BytesIO:
    """The archive with the files that `changes` names made anew; a name that it lacks is added."""
    made = io.BytesIO()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(made, "w") as new:
        folder = old.namelist()[0].partition("/")[0]
        held = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name in {**held, **changes}:
            content = held.get(name, b"")
            new.writestr(f"{folder}/{name}", changes[name](content) if name in changes else content)
    made.seek(0)
    return made


def edited(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """A change of JSON, as a change of its bytes."""

    def edit(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return edit


def calls(target: str) -> Callable[[bytes], bytes]:
    return edited(lambda program: program["graph_module"]["graph"]["nodes"][0].update(target=target))


def signed(**changes: object) -> Callable[[bytes], bytes]:
    """Those fields of the program's call signature made anew."""
    return edited(lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(changes))


def tree(*, kind: str | None = "builtins.dict", context: object = "[]", children: object = ()) -> str:
    """An argument tree whose one node lies below a tuple."""
    node = {"type": kind, "context": context, "children_spec": children}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [node]}])


def enumeration(module: str) -> str:
    return json.dumps({"__enum__": True, "fqn": f"{module}:Kind", "name": "A"})


def with_size(text: str) -> Callable[[bytes], bytes]:
    return edited(lambda program: program.update(range_constraints={"s0": {"expr_str": text}}))


def pickled(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def test_a_program_of_an_ordinary_network_is_plain(program: Path) -> None:
    require_plain_program(program)
    require_plain_program(changed(program, {}))


def test_torch_itself_would_unpickle_what_is_refused(program: Path) -> None:
    sample = io.BytesIO()
    torch.save(((torch.zeros(1),), {}), sample)
    loaded = torch.export.load(changed(program, {"data/sample_inputs/model.pt": lambda _: sample.getvalue()}))
    assert loaded.example_inputs is not None


def test_a_copy_holds_what_was_checked_and_torch_reads_it(program: Path) -> None:
    copy = plain_copy(program)
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(copy) as new:
        assert {name: new.read(name) for name in new.namelist()} == {name: old.read(name) for name in old.namelist()}
    copy.seek(0)
    image = torch.rand(2, 3, 8, 8)
    expected = torch.export.load(program).module()(image)
    torch.testing.assert_close(torch.export.load(copy).module()(image), expected, rtol=0, atol=0)


def test_a_file_that_stands_in_the_archive_twice_is_refused(program: Path) -> None:
    file = changed(program, {})
    with zipfile.ZipFile(file, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("model.json"))
        content = archive.read(name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, content)
    for check in (require_plain_program, plain_copy):
        file.seek(0)
        with pytest.raises(ValueError, match=r"it holds '.*models/model\.json' twice"):
            check(file)


def test_bytes_outside_the_checked_archive_do_not_reach_torch(program: Path) -> None:
    hidden = b"another archive, for another reader"
    inside = io.BytesIO(hidden + program.read_bytes())
    assert hidden not in plain_copy(inside).getvalue()


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that is there to be imported and that nothing has imported."""
    (tmp_path / "chip_deploy_bait.py").write_text("import enum\nclass Kind(enum.Enum):\n    A = 1\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "chip_deploy_bait"
    sys.modules.pop("chip_deploy_bait", None)


def test_torch_itself_would_import_what_an_argument_tree_names(program: Path, bait: str) -> None:
    file = changed(program, {MODEL: signed(out_spec=tree(kind="builtins.list", context=enumeration(bait)))})
    with pytest.raises(ValueError, match="which is no tree"):
        require_plain_program(file)
    assert bait not in sys.modules
    file.seek(0)
    torch.export.load(file)
    assert bait in sys.modules


def test_torch_itself_would_run_the_name_of_an_input(program: Path, bait: str) -> None:
    name = f"input=__import__('{bait}')"  # the default of a function's last argument is evaluated with its definition

    def rename(content: bytes) -> bytes:
        text = json.dumps(json.loads(content)).replace('{"name": "input"}', json.dumps({"name": name}))
        return text.replace('"input": {', f"{json.dumps(name)}: {{").encode()

    file = changed(program, {MODEL: rename})
    with pytest.raises(ValueError, match=rf"names something 'input=__import__\('{bait}'\)', which is no name"):
        require_plain_program(file)
    assert bait not in sys.modules
    file.seek(0)
    torch.export.load(file)
    assert bait in sys.modules


def test_every_operator_of_torch_that_takes_a_files_name_is_refused(program: Path) -> None:
    schemas = [each for each in torch._C._jit_get_all_schemas() if each.name.startswith("aten::")]
    named = {each.name[6:] for each in schemas if "filename" in {given.name for given in each.arguments}}
    assert named == {"from_file", "save"}
    for name in named:
        with pytest.raises(ValueError, match=f"calls 'torch.ops.aten.{name}.default', which is no tensor operator"):
            require_plain_program(changed(program, {MODEL: calls(f"torch.ops.aten.{name}.default")}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data/sample_inputs/model.pt": lambda _: b"\x80\x02N."}, r"model\.pt', which is pickled"),
        ({WEIGHTS: edited(pickled)}, r"'0\.weight' in pickled form"),
        ({"data/weights/model.pt": lambda _: b"x"}, r"holds 'data/weights/model\.pt', which no program of plain"),
        ({"data/constants/opaque_obj_0": lambda _: b"x"}, r"holds 'data/constants/opaque_obj_0'"),
        ({"data/aotinductor/model/model.so": lambda _: b"\x7fELF"}, r"holds 'data/aotinductor/model/model\.so'"),
        ({MODEL: edited(lambda program: program.update(guards_code=["x"]))}, "guards, which are Python code"),
        ({MODEL: calls("torch.hub.load")}, r"calls 'torch\.hub\.load', which is no tensor operator"),
        ({MODEL: calls("torch.ops.load_library")}, "which is no tensor operator"),
        ({MODEL: calls("_operator.methodcaller")}, "which is no tensor operator"),
        ({MODEL: calls("torch.ops.prims.add.default")}, "which is no tensor operator"),
        ({MODEL: calls("torch.ops.aten.manual_seed.default")}, "which is no tensor operator"),
        ({MODEL: signed(in_spec=tree(context=enumeration("this")))}, "'.*this:Kind.*', which is no tree of tuples"),
        ({MODEL: signed(out_spec=tree(kind="builtins.tuple", context=enumeration("this")))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(context="[{}]"))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(context='["a: print()"]'))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(context="["))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(context={"__enum__": True}))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(kind="collections.defaultdict"))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree(kind=None, context=None, children=[1]))}, "which is no tree"),
        ({MODEL: signed(in_spec=tree().replace("[1,", "[2,", 1))}, "which is no tree"),
        ({MODEL: signed(in_spec="1")}, "which is no tree"),
        ({MODEL: signed(in_spec="{")}, "which is no tree"),
        ({MODEL: signed(forward_arg_names=["x: print()"])}, r"names something 'x: print\(\)', which is no name"),
        ({MODEL: edited(lambda program: program.update(torch_version='"),f("'))}, "under 'torch_version', which is no"),
        ({MODEL: with_size("__import__('os').getcwd()")}, r"expression '__import__.*', which is no size"),
        ({MODEL: with_size("open('a')")}, "which is no size"),
        ({MODEL: with_size("Symbol('s0').free_symbols")}, "which is no size"),
        ({MODEL: with_size("(lambda: 1)()")}, "which is no size"),
        ({MODEL: with_size("Symbol")}, "which is no size"),
        ({MODEL: with_size("Symbol('a b')")}, "which is no size"),
        ({MODEL: with_size("1 +")}, "which is no size"),
    ],
)
def test_what_could_run_is_named(program: Path, changes: dict[str, Callable[[bytes], bytes]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        require_plain_program(changed(program, changes))


@pytest.mark.parametrize(
    "text", ["Symbol('s77', positive=True, integer=True)", "2*Symbol('s0')", "Add(Symbol('s1'), Integer(3))", "-1"]
)
def test_sizes_and_their_arithmetic_pass(program: Path, text: str) -> None:
    require_plain_program(changed(program, {MODEL: with_size(text)}))


@pytest.mark.parametrize(
    "text", [tree(), tree(context='["logits", "features"]'), tree(kind="builtins.list", context="null")]
)
def test_trees_of_built_in_types_pass(program: Path, text: str) -> None:
    require_plain_program(changed(program, {MODEL: signed(out_spec=text)}))


def test_what_is_no_archive_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK and nothing more")
    with pytest.raises(ValueError, match="no archive of a torch program"):
        require_plain_program(tmp_path / "model.pt2")


def test_an_archive_without_a_program_is_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(ValueError, match="holds no program"):
        require_plain_program(tmp_path / "model.pt2")


def test_a_truncated_program_is_refused(program: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(program.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no archive of a torch program"):
        require_plain_program(tmp_path / "model.pt2")
