"""What a torch program file (`.pt2`) may hold: tensors as plain bytes and a list of operator calls, nothing that runs.

`torch.export.load` unpickles whatever a program has pickled, loads libraries that were packed into it, imports the
modules of enumerations that its argument trees name, evaluates its symbolic sizes as Python, and writes the names of
its nodes into Python code. A file is read here before it is given to torch, and refused for any of these.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Everything that is in the archive of a program whose weights are ordinary tensors; each name is that of a file below
# the archive's one folder.
PLAIN_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/((weight|tensor)_\d+|model_(weights|constants)_config\.json)"
)
# Torch's own tensor operators, less those of them that act on files, on the output or on the process.
ACTING = r"from_file|save|_print|warn|manual_seed|set_grad_enabled|set_data|wait|dist_backward|_cufft_\w+"
OPERATOR = re.compile(
    rf"torch\.ops\.aten\.(?!({ACTING})\.)\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow)"
)
# Texts that become part of Python code must be names; torch puts the others between quotes.
NAMES = ("name", "as_name", "forward_arg_names")
QUOTED = re.compile(r"[\w .,:;>+-]*")
SYMBOL = re.compile(r"[A-Za-z]\w{0,20}")
FUNCTIONS_OF_SIZES = ("Symbol", "Integer", "Add", "Mul", "Pow", "Mod", "FloorDiv", "Max", "Min")
PARTS_OF_SIZES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Name, ast.Load),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)


def require_plain_program(file: Path | IO[bytes]) -> None:
    """Nothing, if reading the torch program in `file` runs none of its content.

    Cost: reads the archive's list and its JSON, not the weights.
    Raises: ValueError naming what is no program, or what in it could run.
    """
    with _plain_archive(file):
        pass


def plain_copy(file: Path | IO[bytes]) -> io.BytesIO:
    """An archive made anew of the files that were found plain in `file`, for torch to read.

    Torch finds the files of an archive by another reader than ours, and one archive can be written so that two readers
    see two contents. Of the copy there is only one reading.

    Cost: the size of the archive, twice, in memory.
    Raises: ValueError as `require_plain_program` does.
    """
    made = io.BytesIO()
    with _plain_archive(file) as archive, zipfile.ZipFile(made, "w") as copy:
        for entry in archive.infolist():
            copy.writestr(entry.filename, archive.read(entry))
    made.seek(0)
    return made


@contextlib.contextmanager
def _plain_archive(file: Path | IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """The opened archive, whose files are all plain.

    Raises: ValueError, for what does not show before it is read as well.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                _require_plain(archive, entry)
            names = archive.namelist()
            if not any(name.endswith("models/model.json") for name in names):
                raise ValueError("it holds no program")
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"it holds '{twice[0]}' twice")
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, UnicodeDecodeError) as err:
        raise ValueError(f"no archive of a torch program ({err})") from err


def _require_plain(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    name = entry.filename.partition("/")[2]
    if not PLAIN_FILES.fullmatch(name):
        raise ValueError(f"it holds '{name}', which no program of plain tensors has")
    if name.endswith(".pt") and entry.file_size:
        raise ValueError(f"it holds '{name}', which is pickled")
    if name.endswith("_config.json"):
        for held, payload in json.loads(archive.read(entry).decode())["config"].items():
            if payload["use_pickle"] is not False:
                raise ValueError(f"it holds '{held}' in pickled form")
    if name == "models/model.json":
        _require_plain_calls(json.loads(archive.read(entry).decode()))


def _require_plain_calls(program: dict[str, Any]) -> None:
    if program.get("guards_code"):
        raise ValueError("it holds guards, which are Python code")
    for key, text in _texts(program):
        _require_plain_text(text, key=key)


def _require_plain_text(text: str, *, key: str) -> None:
    if key in ("target", "as_operator"):
        if not OPERATOR.fullmatch(text):
            raise ValueError(f"it calls '{text}', which is no tensor operator")
    elif key == "expr_str":
        if not _is_size(text):
            raise ValueError(f"it holds the expression '{text}', which is no size")
    elif key in ("in_spec", "out_spec"):
        if not _is_tree(text):
            raise ValueError(f"it takes or returns '{text}', which is no tree of tuples, lists and dictionaries")
    elif key in NAMES:
        if text and not text.isidentifier():
            raise ValueError(f"it names something '{text}', which is no name")
    elif key != "nn_module_stack" and not QUOTED.fullmatch(text):
        raise ValueError(f"it holds the text '{text}' under '{key}', which is no plain word")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the JSON with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def _is_tree(text: str) -> bool:
    """Whether `text` is what torch writes of arguments in tuples, lists and dictionaries, under its first protocol."""
    try:
        protocol, root = json.loads(text)
    except (ValueError, TypeError):
        return False
    return protocol == 1 and _is_branch(root)


def _is_branch(node: Any) -> bool:
    """Whether one node of such a tree, and all below it, is a leaf or of a built-in type with nothing beside it."""
    match node:
        case {"type": None, "context": None, "children_spec": [], **rest}:
            return not rest
        case {"type": "builtins.tuple" | "builtins.list", "context": "null", "children_spec": [*children], **rest}:
            return not rest and all(map(_is_branch, children))
        case {"type": "builtins.dict", "context": str(keys), "children_spec": [*children], **rest}:
            return not rest and _are_names(keys) and all(map(_is_branch, children))
    return False


def _are_names(text: str) -> bool:
    """Whether `text` is a JSON list of Python names, as the keys of a dictionary of arguments are."""
    try:
        names = json.loads(text)
    except ValueError:
        return False
    return isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)


def _is_size(text: str) -> bool:
    """Whether `text` is arithmetic on named sizes and whole numbers, as `Symbol('s77', integer=True)`."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = {node.func for node in nodes if isinstance(node, ast.Call)}
    return all(
        isinstance(node, PARTS_OF_SIZES)
        and (not isinstance(node, ast.Name) or (node in called and node.id in FUNCTIONS_OF_SIZES))
        and (not isinstance(node, ast.Constant) or not isinstance(node.value, str) or SYMBOL.fullmatch(node.value))
        for node in nodes
    ) and all(isinstance(function, ast.Name) for function in called)
