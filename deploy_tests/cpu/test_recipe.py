"""A recipe says what was asked for, and refuses what nobody can have meant."""

import math
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from chip_deploy.chip.criteria import CRITERIA
from chip_deploy.pipeline.recipe import (
    DenseSection,
    Recipe,
    load_recipe,
    parse_setting,
    recipe_digest,
    recipe_keys,
    recipe_toml,
)

ASKED = {"model.name": "resnet18", "data.name": "digits", "prune.macs": 0.5}


def asked(**changes: Any) -> dict[str, Any]:
    """The smallest complete request, changed; double underscores stand for the dots of a key."""
    return {**ASKED, **{key.replace("__", "."): value for key, value in changes.items()}}


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_alone_make_a_recipe_with_the_documented_defaults() -> None:
    recipe = load_recipe(None, ASKED)
    assert (recipe.model.name, recipe.data.name, recipe.prune.budgets) == ("resnet18", "digits", ("macs",))
    assert (recipe.score.criterion, recipe.score.batch, recipe.prune.min_width) == ("chip", 32, 8)
    assert (recipe.tune.epochs, recipe.tune.lr, recipe.dense.epochs, recipe.dense.lr) == (10, 0.01, 8, 0.02)
    assert (recipe.targets, recipe.export.precision, recipe.seed) == (("ort-cpu",), ("fp32",), 0)


def test_the_command_line_wins_over_the_file_and_leaves_the_rest(tmp_path: Path) -> None:
    text = '[model]\nname = "resnet56"\n[data]\nname = "cifar10"\n[prune]\nmacs = 0.4\n[tune]\nepochs = 3\nlr = 0.1\n'
    recipe = load_recipe(recipe_file(tmp_path, text), {"tune.epochs": 0, "model.name": "resnet20"})
    assert (recipe.tune.epochs, recipe.tune.lr) == (0, 0.1)
    assert (recipe.model.name, recipe.data.name) == ("resnet20", "cifar10")


@pytest.mark.parametrize("written", ["macs = 0.4", "ratio = 0.3", '[prune.layer_ratios]\n"layer1.0.conv1" = 0.4'])
def test_a_budget_on_the_command_line_replaces_the_one_in_the_file(tmp_path: Path, written: str) -> None:
    recipe = load_recipe(recipe_file(tmp_path, f"[prune]\n{written}\n"), {**ASKED, "prune.macs": 0.5})
    assert (recipe.prune.budgets, recipe.prune.macs) == (("macs",), 0.5)


def test_layer_names_with_dots_reach_the_layer_ratios() -> None:
    ratios = {"prune.layer_ratios.layer1.0.conv1": 0.4, "prune.layer_ratios.conv1": 0.0}
    recipe = load_recipe(None, {"model.name": "resnet56", "data.name": "cifar10", **ratios})
    assert recipe.prune.layer_ratios == {"layer1.0.conv1": 0.4, "conv1": 0.0}
    assert recipe.prune.budgets == ("layer_ratios",)


def test_the_allocations_are_those_that_can_be_made() -> None:
    from chip_deploy.chip import allocate
    from chip_deploy.pipeline import recipe

    assert recipe.ALLOCATIONS == allocate.ALLOCATIONS


def test_ratios_per_layer_are_a_list_without_being_called_one(tmp_path: Path) -> None:
    ratios = {"model.name": "a", "data.name": "b", "prune.layer_ratios.conv1": 0.4}
    listed = load_recipe(None, ratios)
    assert (listed.prune.allocation, load_recipe(None, ASKED).prune.allocation) == ("list", "uniform")
    path = recipe_file(tmp_path, recipe_toml(listed))
    assert load_recipe(path) == listed
    instead = load_recipe(path, {"prune.macs": 0.5})  # a budget on the command line takes the list's place
    assert (instead.prune.allocation, instead.prune.budgets) == ("uniform", ("macs",))


@pytest.mark.parametrize("allocation", ["global", "isomorphic", "interaction"])
def test_an_allocation_goes_with_any_budget_and_any_criterion(allocation: str) -> None:
    for budget in ("macs", "params", "ratio"):
        for criterion in CRITERIA:
            request = {key: value for key, value in ASKED.items() if key != "prune.macs"}
            request |= {f"prune.{budget}": 0.5, "prune.allocation": allocation, "score.criterion": criterion}
            recipe = load_recipe(None, request)
            assert (recipe.prune.allocation, recipe.score.criterion) == (allocation, criterion)


def test_scoring_needs_no_budget() -> None:
    overrides = {key: value for key, value in ASKED.items() if key != "prune.macs"}
    assert load_recipe(None, overrides, needs_budget=False).prune.budgets == ()


@pytest.mark.parametrize("budget", ["macs", "params", "ratio"])
@pytest.mark.parametrize("value", [0, 1, -0.5, 2, math.nan, math.inf, -math.inf, "half", "0.5", True])
def test_a_budget_is_a_number_between_nothing_and_everything(budget: str, value: object) -> None:
    overrides = {"model.name": "resnet18", "data.name": "digits", f"prune.{budget}": value}
    expected = rf"^prune\.{budget} = .*: a fraction .*above 0 and below 1, for example 0\.\d\.$"
    with pytest.raises(ValueError, match=expected):
        load_recipe(None, overrides)


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, "half"])
def test_a_layer_ratio_that_is_no_fraction_is_refused_by_layer_name(value: object) -> None:
    overrides = {"model.name": "a", "data.name": "b", "prune.layer_ratios.layer1.0.conv1": value}
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1"):
        load_recipe(None, overrides)


MISTAKES = {
    "two budgets": (asked(prune__ratio=0.3), "2 budgets at once, prune.macs and prune.ratio; exactly one"),
    "no budget": ({"model.name": "a", "data.name": "b"}, "no budget was given, exactly one is expected. Give --macs"),
    "no model": ({"data.name": "b", "prune.macs": 0.5}, "no model was named. Give --model"),
    "no data": ({"model.name": "a", "prune.macs": 0.5}, "no data was named. Give --data"),
    "misspelt key": (asked(prune__critereon="x"), "--set: unknown key 'prune.critereon'. Did you mean 'score.crit"),
    "misspelt section": (asked(tun__epochs=1), "--set: unknown key 'tun.epochs'. Did you mean 'tune.epochs'?"),
    "foreign key": (asked(zzz=1), "--set: unknown key 'zzz'. Sections and keys: model, data, score"),
    "section as a value": (asked(tune=3), "--set: 'tune' is a section with keys of its own. Set 'tune.epochs'"),
    "unknown criterion": (
        asked(score__criterion="chp"),
        "unknown criterion 'chp'. Did you mean 'chip'? Available: chip, cpmc, capacity, interactions, l1",
    ),
    "joint by another criterion": (
        asked(score__joint=True, score__criterion="l1"),
        "joint = true lets channels leave one at a time by 'chip', and criterion is 'l1'. Set joint = false",
    ),
    "unknown allocation": (
        asked(prune__allocation="globl"),
        "unknown allocation 'globl'. Did you mean 'global'? Available: uniform, list, global",
    ),
    "list without ratios": (
        asked(prune__allocation="list"),
        "prune.allocation = 'list' cuts what prune.layer_ratios says of each layer, and it says nothing. Give ratios",
    ),
    "ratios for another allocation": (
        {"model.name": "a", "data.name": "b", "prune.layer_ratios.conv1": 0.4, "prune.allocation": "global"},
        "prune.allocation = 'global' shares out one budget, and prune.layer_ratios gives every layer its own. Keep one",
    ),
    "more than all": (asked(prune__max_ratio=1.5), "prune.max_ratio = 1.5: it should be less than or equal to 1."),
    "unknown target": (asked(targets=["ort-cup"]), "unknown target 'ort-cup'. Did you mean 'ort-cpu'?"),
    "targets as text": (asked(targets="ort-cpu"), "targets = 'ort-cpu': it should be a valid list."),
    "other precision": (asked(export__precision=["fp17"]), "precision 'fp17' cannot be built. Available: fp32, fp16, "),
    "a bound on nothing": (
        asked(quantize__max_drop=0.5),
        "quantize.max_drop = 0.5 bounds what int8 or fp8 may lose, and the precision is fp32. Add --precision int8",
    ),
    "unknown ranges": (
        asked(quantize__calibration="mean"),
        "quantize.calibration = 'mean': it should be 'entropy', 'percentile' or 'min-max'.",
    ),
    "no images": (asked(quantize__images=0), "quantize.images = 0: it should be greater than or equal to 1."),
    "half of a percentile": (asked(quantize__percentile=50), "quantize.percentile = 50: it should be greater than 50."),
    "no precision": (asked(export__precision=[]), "at least one precision is expected"),
    "broken epoch": (asked(tune__epochs=2.5), "tune.epochs = 2.5: it should be a valid integer."),
    "true for a number": (asked(tune__epochs=True), "tune.epochs = True: it should be a valid integer."),
    "negative epochs": (asked(tune__epochs=-1), "tune.epochs = -1: it should be greater than or equal to 0."),
    "endless rate": (asked(tune__lr=math.inf), "tune.lr = inf: it should be a finite number."),
    "no momentum": (asked(tune__momentum=0.0), "tune: nesterov needs a momentum above 0. Set nesterov = false"),
    "dense distillation": (asked(dense__distill=0.5), "the dense network has no teacher to distil from"),
    "no function": (asked(tune__train="mylab.training"), "package.module:function is expected"),
    "number for a path": (asked(model__weights=5), "model.weights = 5: it should be a valid string."),
}


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_sentence_that_names_it(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence is compared below)
        load_recipe(None, overrides)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[prune]\ncritereon = 1\n", "recipe.toml: unknown key 'prune.critereon'. Did you mean 'score.criterion'?"),
        ("[prune]\nratio = 3\n", "recipe.toml: prune.ratio = 3: a fraction of channels"),
        ("[prune]\nmacs = nan\n", "recipe.toml: prune.macs = nan: a fraction to keep"),
        ("[prune]\nmacs = 0.5\nratio = 0.5\n", "recipe.toml: 2 budgets at once"),
        ("[prunes]\n", "recipe.toml: unknown key 'prunes'."),
        ("prune = 0.5\n", "recipe.toml: 'prune' is a section"),
        ("[prune\nmacs = 0.5\n", "recipe.toml: not valid TOML: expected ']'"),
    ],
)
def test_a_mistake_in_the_file_is_said_with_its_name(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence is compared below)
        load_recipe(recipe_file(tmp_path, text), {"model.name": "a", "data.name": "b"})
    assert str(caught.value).startswith(sentence)


def test_a_recipe_that_is_missing_a_folder_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.toml: no such recipe\."):
        load_recipe(tmp_path / "none.toml", ASKED)
    with pytest.raises(ValueError, match="a folder, but a recipe file is expected"):
        load_recipe(tmp_path, ASKED)
    (tmp_path / "image.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.toml: not UTF-8 text"):
        load_recipe(tmp_path / "image.toml", ASKED)


def test_targets_have_one_spelling_and_come_once() -> None:
    recipe = load_recipe(None, asked(targets=["trt-rtx:sm89,sm86", "ort-cpu", "trt-rtx:sm86,sm89"]))
    assert recipe.targets == ("trt-rtx:sm86,sm89", "ort-cpu")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe(None, ASKED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tune.epochs=0", ("tune.epochs", 0)),
        ("tune.lr=1e-3", ("tune.lr", 0.001)),
        ("tune.augment=false", ("tune.augment", False)),
        ('targets=["ort-cpu"]', ("targets", ["ort-cpu"])),
        ("model.name=resnet18", ("model.name", "resnet18")),
        ("data.name=random:64", ("data.name", "random:64")),
        ("data.name=2020-01-01", ("data.name", "2020-01-01")),
        ("model.weights=a=b.pt", ("model.weights", "a=b.pt")),
        ("tune.train=", ("tune.train", "")),
    ],
)
def test_a_setting_is_read_as_toml_or_else_as_text(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["tune.epochs", "=3", " =3", ""])
def test_a_setting_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE is expected"):
        parse_setting(text)


fractions = st.floats(0.001, 0.999)
budgets = st.one_of(
    fractions.map(lambda value: {"prune.macs": value}),
    fractions.map(lambda value: {"prune.ratio": value}),
    st.dictionaries(st.text("abc.123", min_size=1), fractions, min_size=1).map(
        lambda ratios: {"prune.layer_ratios": ratios}
    ),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)


@given(
    budget=budgets, name=names, lr=st.floats(1e-12, 1e6), epochs=st.integers(0, 10**6), seed=st.integers(0, 2**32 - 1)
)
def test_what_was_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, budget: dict[str, Any], name: str, lr: float, epochs: int, seed: int
) -> None:
    recipe = load_recipe(
        None, {"model.name": name, "data.name": name, **budget, "tune.lr": lr, "tune.epochs": epochs, "seed": seed}
    )
    path = recipe_file(tmp_path_factory.mktemp("recipe"), recipe_toml(recipe))
    assert load_recipe(path) == recipe
    assert recipe_digest(load_recipe(path)) == recipe_digest(recipe)


def test_ratios_on_the_command_line_replace_the_budget_of_a_written_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, recipe_toml(load_recipe(None, ASKED)))
    asked = load_recipe(path, {"prune.layer_ratios.conv1": 0.4}).prune
    assert (asked.allocation, asked.budgets) == ("list", ("layer_ratios",))


def test_the_written_recipe_holds_every_default() -> None:
    written = tomli.loads(recipe_toml(load_recipe(None, ASKED)))
    optional = {
        "weights",
        "size",
        "eval_images",
        "images",
        "params",
        "ratio",
        "round_to",
        "max_ratio",
        "max_images",
        "recover",
        "train",
        "file",
        "max_drop",
        "workspace_mib",
        "optimization_level",
    }
    held = {f"{name}.{key}" for name, part in written.items() if isinstance(part, dict) for key in part}
    assert {key for key in set(recipe_keys()) - held if "." in key and key.split(".")[1] not in optional} == set()


def test_another_setting_gives_another_digest() -> None:
    digests = {
        recipe_digest(load_recipe(None, overrides))
        for overrides in (ASKED, asked(prune__macs=0.6), asked(seed=1), asked(tune__epochs=9), asked(model__name="b"))
    }
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)


def test_the_order_of_writing_does_not_change_the_digest(tmp_path: Path) -> None:
    text = '[prune]\nmacs = 0.5\n[data]\nname = "digits"\n[model]\nname = "resnet18"\n'
    assert recipe_digest(load_recipe(recipe_file(tmp_path, text))) == recipe_digest(load_recipe(None, ASKED))


def test_a_recipe_survives_the_json_of_a_report() -> None:
    recipe = load_recipe(None, ASKED)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_dense_section_reads_like_the_tune_section() -> None:
    shared = set(DenseSection.model_fields)
    assert {key.split(".")[1] for key in recipe_keys() if key.startswith("tune.")} == shared | {
        "recalibrate_images",
        "recover",
        "recover_images",
        "recover_steps",
        "recover_lr",
        "train",
    }
