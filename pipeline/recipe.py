"""What was asked for: a recipe, read from TOML and the command line, checked before anything else runs."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..chip.criteria import CRITERIA
from ..export.precision import QUANTISED, QuantizeSettings
from ..export.target import PRECISIONS, BuildOptions, parse_target

BUDGETS = ("macs", "params", "ratio")
"""Budgets that are one number; per-layer ratios are the fourth way to ask."""

DEVICES = ("auto", "cpu", "cuda")

ALLOCATIONS = ("uniform", "list", "global", "isomorphic", "interaction")
"""As in `chip.allocate`, which only a machine with torch can import."""

RECOVERIES = ("interactions",)

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which network, and the trained weights to load into it."""

    name: str = ""
    weights: str | None = None


class DataSection(_Section):
    """Which images, at which side length, and how many of them measure accuracy (all of them when not given)."""

    name: str = ""
    size: int | None = Field(default=None, ge=1)
    eval_images: int | None = Field(default=None, ge=1)


class ScoreSection(_Section):
    """Which criterion judges the channels, on how many images.

    Each group sees images until its kept set is stable, from `min_images` to `max_images`: in `confidence` of the
    bootstrap resamples at least `overlap` of it is the same. `images` asks for exactly so many instead. `joint` lets
    channels leave one at a time, judged on `images` (64) images and by no rule. `file` takes the scores that
    `chip-deploy score` wrote. `device` is auto, cpu or cuda.
    """

    criterion: str = "chip"
    images: int | None = Field(default=None, ge=1)
    min_images: int = Field(default=32, ge=32)
    max_images: int = Field(default=640, ge=32)
    overlap: float = Field(default=0.95, gt=0, le=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    joint: bool = False
    batch: int = Field(default=32, ge=1)
    device: str = "auto"
    file: str | None = None

    @property
    def label(self) -> str:
        """The criterion's name, with its mode."""
        return f"{self.criterion} joint" if self.joint else self.criterion

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CRITERIA:
            raise ValueError(f"unknown criterion '{name}'.{_did_you_mean(name, CRITERIA)} {_available(CRITERIA)}")
        return name

    @field_validator("device")
    @classmethod
    def _a_device(cls, name: str) -> str:
        if name not in DEVICES:
            raise ValueError(f"unknown device '{name}'.{_did_you_mean(name, DEVICES)} {_available(DEVICES)}")
        return name

    @model_validator(mode="after")
    def _joint_is_by_chip(self) -> ScoreSection:
        if self.joint and self.criterion != "chip":
            raise ValueError(
                f"joint = true lets channels leave one at a time by 'chip', and criterion is '{self.criterion}'. Set "
                'joint = false, or criterion = "chip"'
            )
        return self

    @model_validator(mode="after")
    def _min_below_max(self) -> ScoreSection:
        if self.min_images > self.max_images:
            raise ValueError(
                f"min_images = {self.min_images} is more than max_images = {self.max_images}. Raise max_images"
            )
        return self


class PruneSection(_Section):
    """How much to cut, and where: one budget, its allocation to the groups, and the widths that the cut may leave.

    `allocation`: uniform takes the same share of every group; global, isomorphic and interaction go by what the
    criterion found; list is what `layer_ratios` says. No group loses more than `max_ratio` of its channels: where it is
    not given, 0.9 if the allocation goes by scores, else all that `min_width` allows.
    Unit: `macs` and `params` are fractions kept; `ratio`, `layer_ratios` and `max_ratio` are fractions of channels
    removed, `ratio` of every group or, where the allocation goes by scores, of all of them together.
    """

    macs: float | None = None
    params: float | None = None
    ratio: float | None = None
    layer_ratios: dict[str, float] = Field(default_factory=dict)
    allocation: str = "uniform"
    max_ratio: float | None = Field(default=None, gt=0, le=1)
    round_to: int | None = Field(default=None, ge=1)
    min_width: int = Field(default=8, ge=1)

    @property
    def budgets(self) -> tuple[str, ...]:
        """The names of the budgets that are set: exactly one in a recipe that can be pruned by."""
        numbers = tuple(name for name in BUDGETS if getattr(self, name) is not None)
        return (*numbers, "layer_ratios") if self.layer_ratios else numbers

    @model_validator(mode="before")
    @classmethod
    def _ratios_are_a_list(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("layer_ratios") and "allocation" not in given:
            return {**given, "allocation": "list"}
        return given

    @field_validator("allocation")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALLOCATIONS:
            near = _did_you_mean(name, ALLOCATIONS)
            raise ValueError(f"unknown allocation '{name}'.{near} {_available(ALLOCATIONS)}")
        return name

    @field_validator("macs", "params", mode="before")
    @classmethod
    def _keeps_a_part(cls, kept: Any) -> Any:
        if not _is_part(kept):
            raise ValueError("a fraction to keep is expected, above 0 and below 1, for example 0.5")
        return kept

    @field_validator("ratio", mode="before")
    @classmethod
    def _removes_a_part(cls, removed: Any) -> Any:
        if not _is_part(removed):
            raise ValueError("a fraction of channels to remove is expected, above 0 and below 1, for example 0.3")
        return removed

    @field_validator("layer_ratios")
    @classmethod
    def _remove_less_than_all(cls, ratios: dict[str, float]) -> dict[str, float]:
        for layer, ratio in ratios.items():
            if not 0 <= ratio < 1:
                raise ValueError(f"layer '{layer}' has {ratio}; a fraction to remove, from 0 to below 1, is expected")
        return ratios

    @model_validator(mode="after")
    def _one_budget_at_most(self) -> PruneSection:
        if len(self.budgets) > 1:
            names = " and ".join(f"prune.{name}" for name in self.budgets)
            raise ValueError(f"{len(self.budgets)} budgets at once, {names}; exactly one is expected. Keep one of them")
        return self

    @model_validator(mode="after")
    def _ratios_for_a_list(self) -> PruneSection:
        if self.allocation == "list" and not self.layer_ratios:
            raise ValueError(
                "prune.allocation = 'list' cuts what prune.layer_ratios says of each layer, and it says nothing. Give "
                "ratios, or another allocation"
            )
        if self.layer_ratios and self.allocation != "list":
            raise ValueError(
                f"prune.allocation = '{self.allocation}' shares out one budget, and prune.layer_ratios gives every "
                "layer its own. Keep one of them"
            )
        return self


class TrainSettings(_Section):
    """How a network is trained: SGD, a linear warm-up, then a cosine to zero.

    Unit: `distill` is the weight of the teacher's softened outputs in the loss, from 0 (labels only) to 1.
    """

    epochs: int = Field(default=10, ge=0)
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    nesterov: bool = True
    warmup_epochs: int = Field(default=1, ge=0)
    batch: int = Field(default=128, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    distill: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=4.0, gt=0)
    augment: bool = True
    max_images: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> TrainSettings:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0. Set nesterov = false, or a momentum")
        return self


class TuneSection(TrainSettings):
    """How the pruned network is brought back: BN recalibration, recovery if asked, then training.

    `recover = "interactions"`: `recover_steps` steps of Adam from the rate `recover_lr` on `recover_images`, `batch`
    rows in a pass, so that the channels that are left act together as they did before. `train`: the user's own function
    in place of ours.
    """

    recalibrate_images: int = Field(default=1024, ge=0)
    recover: str | None = None
    recover_images: int = Field(default=256, ge=1)
    recover_steps: int = Field(default=40, ge=1)
    recover_lr: float = Field(default=1e-3, gt=0)
    train: str | None = None

    @field_validator("recover")
    @classmethod
    def _can_recover(cls, way: str | None) -> str | None:
        if way is not None and way not in RECOVERIES:
            raise ValueError(f"unknown recovery '{way}'.{_did_you_mean(way, RECOVERIES)} {_available(RECOVERIES)}")
        return way

    @field_validator("train")
    @classmethod
    def _names_a_function(cls, train: str | None) -> str | None:
        if train is not None and not FUNCTION.fullmatch(train):
            raise ValueError("package.module:function is expected, for example mylab.training:finetune")
        return train


class DenseSection(TrainSettings):
    """How the dense network is trained first, where a small data set comes without weights."""

    epochs: int = Field(default=8, ge=0)
    lr: float = Field(default=0.02, gt=0)
    batch: int = Field(default=64, ge=1)

    @field_validator("distill")
    @classmethod
    def _has_no_teacher(cls, distill: float) -> float:
        if distill:
            raise ValueError("the dense network has no teacher to distil from. Leave it at 0, or set tune.distill")
        return distill


class ExportSection(_Section):
    """How the network is written as ONNX, and the precisions that it is written and built in: `["fp16", "int8"]`."""

    dynamic_batch: bool = False
    precision: tuple[str, ...] = Field(default=("fp32",), strict=False)

    @field_validator("precision")
    @classmethod
    def _can_be_built(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("at least one precision is expected")
        for name in names:
            if name not in PRECISIONS:
                raise ValueError(f"precision '{name}' cannot be built. {_available(PRECISIONS)}")
        return tuple(dict.fromkeys(names))


class MeasureSection(_Section):
    """How latency is measured: seconds and laps a side, whichever takes longer, shared out among openings.

    `openings` is how often every session is opened anew: two sessions on one file differ by where their memory lies.
    With two or three the interval is hardly ever narrow enough for a verdict; with one it speaks for one session.
    """

    seconds: float = Field(default=3.0, gt=0)
    laps: int = Field(default=200, ge=1)
    openings: int = Field(default=6, ge=1)
    warmup_ms: float = Field(default=200.0, ge=0)
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)


class Recipe(_Section):
    """Everything that decides what a run does; two runs of one recipe cut the same channels."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    score: ScoreSection = ScoreSection()
    prune: PruneSection = PruneSection()
    tune: TuneSection = TuneSection()
    dense: DenseSection = DenseSection()
    export: ExportSection = ExportSection()
    quantize: QuantizeSettings = QuantizeSettings()
    build: BuildOptions = BuildOptions()
    measure: MeasureSection = MeasureSection()
    targets: tuple[str, ...] = Field(default=("ort-cpu",), strict=False)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("no target is left. Name at least one, for example ort-cpu")
        return tuple(dict.fromkeys(str(parse_target(text)) for text in targets))

    @model_validator(mode="after")
    def _max_drop_bounds_something(self) -> Recipe:
        if self.quantize.max_drop is not None and not set(QUANTISED) & set(self.export.precision):
            raise ValueError(
                f"quantize.max_drop = {self.quantize.max_drop:g} bounds what {' or '.join(QUANTISED)} may lose, and "
                f"the precision is {', '.join(self.export.precision)}. Add --precision int8, or leave it out"
            )
        return self


def load_recipe(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, *, needs_budget: bool = True
) -> Recipe:
    """The recipe in `path`, with what the command line says instead under dotted keys (`{"tune.epochs": 0}`).

    A budget on the command line replaces the file's budget, whichever of the four it is.
    Raises: FileNotFoundError; ValueError with one sentence naming the key, its value, and what was expected or the
    nearest known key; ValueError without a model, data or (unless `needs_budget` is false) exactly one budget.
    """
    written = _read_toml(path) if path else {}
    file_name = path.name if path else ""
    asked = _nested(overrides or {})
    _require_known(written, where=file_name)
    _require_known(asked, where="--set")
    if _has_budget(asked):
        for name in (*BUDGETS, "layer_ratios"):
            written.get("prune", {}).pop(name, None)
        if "layer_ratios" in asked["prune"] or written.get("prune", {}).get("allocation") == "list":
            written.get("prune", {}).pop("allocation", None)  # it went with the other budget
    try:
        recipe = Recipe.model_validate(_merged(written, asked))
    except ValidationError as err:
        raise ValueError(_sentence(err, written, asked, file_name)) from err
    _require_complete(recipe, needs_budget=needs_budget)
    return recipe


def parse_setting(text: str) -> tuple[str, Any]:
    """The key and value of `--set key=value`; the value is read as TOML, and as plain text where it is none.

    >>> parse_setting("tune.epochs=0"), parse_setting("model.name=resnet18")
    (('tune.epochs', 0), ('model.name', 'resnet18'))

    Raises: ValueError when there is no `=` or no key before it.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: KEY=VALUE is expected, for example --set tune.epochs=0.")
    return key.strip(), _toml_value(value.strip())


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, defaults included; `load_recipe` reads it back to an equal one."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 over every setting of the recipe, as 64 hexadecimal digits; the order of writing does not count."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_keys() -> tuple[str, ...]:
    """Every key that a recipe may hold, dotted: `prune.round_to`; `prune.layer_ratios` takes layer names below it."""
    keys = []
    for name, section in _fields().items():
        keys += [f"{name}.{field}" for field in section.model_fields] if section else [name]
    return tuple(keys)


def _fields() -> dict[str, type[BaseModel] | None]:
    """Name of each top-level field -> its section, or None for a plain value."""
    kinds = {name: info.annotation for name, info in Recipe.model_fields.items()}
    return {
        name: kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None for name, kind in kinds.items()
    }


def _read_toml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path}: a folder, but a recipe file is expected. Give the .toml file inside.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe. Check the path, or leave it out and use options.")
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as err:
        raise ValueError(f"{path.name}: not UTF-8 text, so no TOML. Give a recipe file.") from err
    except tomli.TOMLDecodeError as err:
        raise ValueError(
            f"{path.name}: not valid TOML: {str(err)[0].lower()}{str(err)[1:]}. Correct that line."
        ) from err


def _toml_value(text: str) -> Any:
    try:
        value = tomli.loads(f"value = {text}\n")["value"]
    except tomli.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"tune.epochs": 0}` as `{"tune": {"epochs": 0}}`; what follows `prune.layer_ratios.` is one layer's name."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        field, _, layer = rest.partition(".")
        if (section, field) == ("prune", "layer_ratios") and layer:
            nested.setdefault(section, {}).setdefault(field, {})[layer] = value
        elif rest and _fields().get(section, True):
            _subsection(nested, section, key)[rest] = value
        else:
            nested[key] = value
    return nested


def _subsection(nested: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    found = nested.setdefault(section, {})
    if not isinstance(found, dict):
        raise ValueError(f"--set: '{section}' and '{key}' cannot both be set. Keep '{key}'.")
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _has_budget(asked: Mapping[str, Any]) -> bool:
    return any(name in asked.get("prune", {}) for name in (*BUDGETS, "layer_ratios"))


def _require_known(given: Mapping[str, Any], *, where: str) -> None:
    """Raises ValueError for the first key that a recipe does not have, and for a section that is no section."""
    known = set(recipe_keys())
    sections = {name for name, section in _fields().items() if section}
    for key, value in given.items():
        if key in sections and not isinstance(value, dict):
            first = next(name for name in recipe_keys() if name.startswith(f"{key}."))
            raise ValueError(f"{where}: '{key}' is a section with keys of its own. Set '{first}', for example.")
        has_keys = isinstance(value, dict) and (value or key in sections)
        for name in (f"{key}.{below}" for below in value) if has_keys else (key,):
            if name not in known:
                raise ValueError(f"{where}: unknown key '{name}'.{_nearest_key(name)}")


def _nearest_key(name: str) -> str:
    """` Did you mean '...'?` for the known key whose last part, or whole, is most like `name`; the keys if none is."""

    def likeness(key: str) -> float:
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], key.rpartition(".")[2]).ratio()
        return 0.7 * last + 0.3 * difflib.SequenceMatcher(None, name, key).ratio()

    best = max(recipe_keys(), key=likeness)
    if likeness(best) >= 0.55:
        return f" Did you mean '{best}'?"
    return f" Sections and keys: {', '.join(_fields())}."


def _sentence(err: ValidationError, written: Mapping[str, Any], asked: Mapping[str, Any], file_name: str) -> str:
    """The first complaint of pydantic as one sentence of ours: where, which key, its value, what is expected."""
    first = err.errors()[0]
    keys = [str(part) for part in first["loc"] if not isinstance(part, int)]
    name = ".".join(keys)
    where = f"{file_name}: " if _holds(written, keys) and not _holds(asked, keys) else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        message = message.replace("Input should", "it should").replace("tuple", "list")
    if keys in ([], ["prune"]):
        return f"{where}{message}."
    told = isinstance(first["input"], dict) or "unknown" in message or "cannot be built" in message
    value = "" if told else f" = {_shown(first['input'])}"
    return f"{where}{name}{value}: {message.removesuffix('.')}."


def _holds(tree: Mapping[str, Any], keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require_complete(recipe: Recipe, *, needs_budget: bool) -> None:
    if not recipe.model.name:
        raise ValueError("no model was named. Give --model NAME, or model.name in the recipe.")
    if not recipe.data.name:
        raise ValueError("no data was named. Give --data NAME (for example digits), or data.name in the recipe.")
    if needs_budget and not recipe.prune.budgets:
        raise ValueError(
            "no budget was given, exactly one is expected. "
            "Give --macs 0.5, --params 0.5 or --ratio 0.3, or prune.layer_ratios in the recipe."
        )


def _is_part(value: Any) -> bool:
    """Whether `value` is a number strictly between 0 and 1, or None; NaN and true are not."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1)


def _did_you_mean(name: str, known: tuple[str, ...]) -> str:
    match = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    return f" Did you mean '{match[0]}'?" if match else ""


def _available(names: tuple[str, ...]) -> str:
    return f"Available: {', '.join(names)}"
