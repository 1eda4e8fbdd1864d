"""The command line is frozen: whoever changes a command or an option changes this list as well, knowingly."""

import typer

from chip_deploy.pipeline.cli import app

# Command -> its arguments and options; a star marks what must be given.
FROZEN = {
    "prune": (
        "RECIPE.toml --model --weights --data --criterion --macs --params --ratio --target --precision --max-drop "
        "--scores --out --set --resume --dry-run --json"
    ),
    "score": "RECIPE.toml --model --weights --data --criterion --set --out",
    "build": "*BUNDLE *--target --precision --shapes --builds --set",
    "measure": "*BUNDLE --target --protocol --batch",
    "verify": "*BUNDLE",
    "gate": "*BUNDLE *--require --target --junit --markdown --json",
    "compare": "*BUNDLE... --target --out --json",
    "compare-criteria": (
        "RECIPE.toml --model --weights --data --criteria --macs --allocation --seeds --target --out --set --resume "
        "--json"
    ),
    "report": "*BUNDLE",
    "doctor": "--json",
}
MANY = {
    *(("prune", "--target"), ("prune", "--set"), ("score", "--set"), ("gate", "--require")),
    *(("build", "--shapes"), ("build", "--set"), ("compare-criteria", "--target"), ("compare-criteria", "--set")),
}


def parameters() -> dict[str, list[typer.core.TyperArgument | typer.core.TyperOption]]:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    return {name: command.params for name, command in commands.items()}


def spelled(parameter: typer.core.TyperArgument | typer.core.TyperOption) -> str:
    name = parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.metavar)
    return f"{'*' if parameter.required else ''}{name}"


def test_the_commands_and_their_options_are_the_frozen_ones() -> None:
    assert {name: " ".join(map(spelled, found)) for name, found in parameters().items()} == FROZEN


def test_options_have_one_spelling_and_no_negative_twin() -> None:
    options = [option for found in parameters().values() for option in found if option.param_type_name == "option"]
    assert [option.opts for option in options if len(option.opts) != 1 or option.secondary_opts] == []


def test_the_options_that_may_be_repeated_are_the_frozen_ones() -> None:
    repeated = {(name, each.opts[0]) for name, found in parameters().items() for each in found if each.multiple}
    assert repeated == MANY


def test_every_option_and_argument_has_a_help_text() -> None:
    assert [spelled(each) for found in parameters().values() for each in found if not each.help] == []
