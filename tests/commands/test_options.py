"""Options: how layers, ratios and names are read from the command line."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import click
import pytest
import torch

from lorakit.cli import COMMANDS, load_command
from lorakit.commands import _options, _text_types, _types
from lorakit.settings import (
    AskingSettings,
    BoundarySettings,
    GenerationSettings,
    JudgeSettings,
    LoraSettings,
    PruningSettings,
    SelectionSettings,
    SheetSettings,
    SignificanceSettings,
    StaticSettings,
    TrainingSettings,
)


def convert(kind: click.ParamType[Any], text: str) -> Any:
    return kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0-3", (0, 1, 2, 3)),
        ("7-7", (7,)),
        ("0-1,24", (0, 1, 24)),
        ("5,3,4", (3, 4, 5)),
        ("0-2,1-3,2", (0, 1, 2, 3)),
        (" 1 , 3-4 ", (1, 3, 4)),
        ("9998-9999", (9998, 9999)),
    ],
)
def test_layers_are_numbers_and_ranges_sorted_each_once(text: str, layers: tuple[int, ...]) -> None:
    assert convert(_text_types.Layers(), text) == layers


@pytest.mark.parametrize(
    "text",
    ["", ",", "1,", "a", "-1", "-", "5-", "1-2-3", "1.5", "1 2", "٣", "10000", "0-99999999999"],
)
def test_what_is_no_set_of_layers_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a layer or a range of layers"):
        convert(_text_types.Layers(), text)


def test_a_range_that_runs_backwards_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="'3-1' runs backwards"):
        convert(_text_types.Layers(), "0,3-1")


@pytest.mark.parametrize("text", ["0", "0.1", ".5", "0.30", "1e-3", "0.999999999999999999999"])
def test_a_ratio_is_the_exact_decimal_it_was_written_as(text: str) -> None:
    assert convert(_types.Amounts("ratio", below=1), text) == (Decimal(text),)


def test_a_ratio_is_not_rounded_through_a_float() -> None:
    (ratio,) = convert(_types.Amounts("ratio", below=1), "0.29")
    assert int(ratio * 100) == 29
    assert int(float("0.29") * 100) == 28


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a number"),
        ("x", "is not a number"),
        ("10%", "is not a number"),
        ("0.1,,0.2", "is not a number"),
        ("0.1,auto", "'auto' is not a number"),
        ("nan", "is not a number"),
        ("-sNaN", "is not a number"),
        ("inf", "is not a number"),
        ("1", "1 is not in 0 ≤ ratio < 1"),
        ("-0.1", "is not in 0 ≤ ratio < 1"),
        ("0.1,1e9", "1e9 is not in 0 ≤ ratio < 1"),
    ],
)
def test_what_is_no_ratio_is_refused(text: str, reason: str) -> None:
    with pytest.raises(click.BadParameter, match=reason):
        convert(_types.Amounts("ratio", below=1), text)


def test_several_ratios_are_a_list_and_auto_is_itself() -> None:
    assert convert(_types.Amounts("ratio", below=1), "0.1, 0.3") == (
        Decimal("0.1"),
        Decimal("0.3"),
    )
    assert convert(_types.Amounts("ratio", below=1), "auto") == "auto"


@pytest.mark.parametrize(("text", "steps"), [("1", 1), ("20", 20), ("epoch", "epoch")])
def test_an_interval_is_a_number_of_steps_or_an_epoch(text: str, steps: object) -> None:
    assert convert(_types.StepsOrEpoch(), text) == steps


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "epochs"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="neither a number of steps from 1 up nor 'epoch'"):
        convert(_types.StepsOrEpoch(), text)


def test_a_threshold_may_be_any_number_from_zero_up() -> None:
    assert convert(_types.Amounts("threshold"), "1e9") == (Decimal("1e9"),)
    with pytest.raises(click.BadParameter, match=r"-1 is not in 0 ≤ threshold$"):
        convert(_types.Amounts("threshold"), "-1")


def test_factors_are_sorted_each_once() -> None:
    assert convert(_types.Factors(), "0.5, 0,0.25,0.5,-0") == (0.0, 0.25, 0.5)


@pytest.mark.parametrize("text", ["-0.1", "1.01", "0,2"])
def test_a_factor_outside_the_unit_interval_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not in 0 ≤ factor ≤ 1"):
        convert(_types.Factors(), text)


@pytest.mark.parametrize("text", ["1", "0.2", "1e-9", "1.0"])
def test_a_density_is_the_exact_decimal_it_was_written_as(text: str) -> None:
    assert convert(_types.Density(), text) == Decimal(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "0", "-0.1", "1.0000000000000000000001", "inf"])
def test_what_is_no_density_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a number|is not in 0 < density ≤ 1"):
        convert(_types.Density(), text)


@pytest.mark.parametrize(
    ("text", "numbers"), [("1", (1.0,)), ("-0.5, 2e-1", (-0.5, 0.2)), ("0,0", (0.0, 0.0))]
)
def test_numbers_are_separated_by_commas(text: str, numbers: tuple[float, ...]) -> None:
    assert convert(_types.Numbers(), text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "1;2", "nan", "inf", "1e999"])
def test_what_are_no_numbers_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a number"):
        convert(_types.Numbers(), text)


@pytest.mark.parametrize(
    ("text", "names"),
    [("q_proj", ("q_proj",)), ("q_proj, v_proj", ("q_proj", "v_proj")), ("a.b", ("a.b",))],
)
def test_names_are_separated_by_commas(text: str, names: tuple[str, ...]) -> None:
    assert convert(_text_types.Names(), text) == names


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a, ", " "])
def test_an_empty_name_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="has an empty name"):
        convert(_text_types.Names(), text)


@pytest.mark.parametrize(
    ("text", "stop"),
    [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\nabla", r"\nabla"), ("\\q\\", "\\q\\"), (" ", " ")],
)
def test_a_stop_text_may_write_a_line_end(text: str, stop: str) -> None:
    assert convert(_text_types.StopText(), text) == stop


@pytest.mark.parametrize("kind", [_text_types.Names(), _text_types.Layers(), _types.Numbers()])
def test_a_value_that_is_read_already_stays(kind: click.ParamType[Any]) -> None:
    assert kind.convert((1, 2), None, None) == (1, 2)


def test_settings_take_their_own_fields_from_the_parameters() -> None:
    parameters = {"rank": 4, "layers": (1,), "output": "x"}
    assert _options.settings_of(LoraSettings, parameters) == LoraSettings(rank=4, layers=(1,))
    assert parameters == {"rank": 4, "layers": (1,), "output": "x"}


def test_a_command_gets_its_parameters_as_settings_and_the_rest_as_they_are() -> None:
    calls: list[tuple[object, ...]] = []

    @_options.settings(lora=LoraSettings, static=StaticSettings)
    def command(output: str, weights: str, lora: LoraSettings, static: StaticSettings) -> None:
        """Take weights itself, though the static settings have such a field."""
        calls.append((output, weights, lora, static))

    command(output="x", weights="w", rank=4, seed=1)
    assert calls == [("x", "w", LoraSettings(rank=4), StaticSettings(rank=4, seed=1))]
    assert command.__name__ == "command"
    with pytest.raises(TypeError, match="unknown"):
        command(output="x", weights="w", unknown=1)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        pytest.param("train-adapter", TrainingSettings(), id="train-adapter"),
        pytest.param("train-adapter", LoraSettings(), id="train-adapter's LoRA"),
        pytest.param("merge", TrainingSettings(), id="merge"),
        pytest.param("merge", PruningSettings(), id="merge's pruning"),
        pytest.param("merge", SelectionSettings(), id="merge's selection"),
        pytest.param("merge", StaticSettings(), id="merge without data"),
        pytest.param("generate", GenerationSettings(), id="generate"),
        pytest.param("generate", AskingSettings(), id="generate by a server"),
        pytest.param("score", SignificanceSettings(), id="score"),
        pytest.param("judge", JudgeSettings(), id="judge"),
        pytest.param("judge", SheetSettings(), id="judge's sheets"),
        pytest.param("find-boundary", BoundarySettings(), id="find-boundary"),
    ],
)
def test_a_command_without_options_has_the_defaults_of_the_settings(
    command: str, settings: Any
) -> None:
    arguments = {
        "merge": ["--data", "x", "a", "b"],
        "score": ["x"],
        "judge": ["a", "--endpoint", "http://x/v1", "--judge-model", "x"],
    }.get(command, ["--data", "x"])
    context = load_command(command).make_context(command, arguments)
    parameters = dict(context.params)
    if command == "merge":  # a list of ratios: none is the settings' own
        assert parameters["prune_ratio"] is None
        parameters["prune_ratio"] = PruningSettings.prune_ratio
    assert _options.settings_of(type(settings), parameters) == settings
    assert set(vars(settings)) <= set(context.params), "a setting that no option can change"


@pytest.mark.parametrize("paths", [("-", "-"), ("a", "-", None, "-")])
def test_two_inputs_from_one_pipe_are_a_usage_error(paths: tuple[str | None, ...]) -> None:
    with pytest.raises(click.UsageError, match="one stdin"):
        _options.check_stdin(*paths)


def test_one_input_from_a_pipe_is_none() -> None:
    _options.check_stdin("-", "a", None, "a")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_a_help_text_and_one_name_in_all_commands(command: str) -> None:
    known: dict[str, set[str | None]] = {}
    for other in map(load_command, COMMANDS):
        for parameter in other.params:
            for flag in parameter.opts if isinstance(parameter, click.Option) else ():
                known.setdefault(flag, set()).add(parameter.name)
    for parameter in load_command(command).params:
        if isinstance(parameter, click.Option):
            assert all(known[flag] == {parameter.name} for flag in parameter.opts)
            assert parameter.help or parameter.name in UNEXPLAINED, parameter.name


UNEXPLAINED = ("rank", "alpha", "split")  # the name and the default say it


HOSTILE = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e30",
    "1e-320",
    "1e999",
    "100000000000000000000",
    "-1",
    "",
]


def numbers_of(command: str) -> list[tuple[str, click.Option]]:
    """Return a command's options that take one number, with the command's name."""
    options = [
        option
        for option in load_command(command).params
        if isinstance(option, click.Option) and option.type.name in NUMBERS
    ]
    return [(command, option) for option in options]


NUMBERS = {"integer", "integer range", "float", "float range"}
NUMBER_OPTIONS = [pair for command in COMMANDS for pair in numbers_of(command)]


@pytest.mark.parametrize(
    ("command", "option"), NUMBER_OPTIONS, ids=lambda value: getattr(value, "name", value)
)
def test_every_option_for_a_number_takes_only_numbers_that_can_be_computed_with(
    command: str, option: click.Option
) -> None:
    assert isinstance(option.type, (_types.Whole, _types.Real))
    taken = {text for text in HOSTILE if is_taken(option, text)}
    assert not taken & {"nan", "-nan", "-inf", "1e-320", ""}
    assert ("inf" in taken) == (option.name == "max_grad_norm")
    if isinstance(option.type, _types.Whole):
        assert not taken


def is_taken(option: click.Option, text: str) -> bool:
    try:
        value = convert(option.type, text)
    except click.BadParameter:
        return False
    assert value == math.inf or torch.isfinite(torch.tensor(value, dtype=torch.float32))
    return True


def test_a_number_out_of_range_is_refused_in_one_line_that_says_why() -> None:
    for text, reason in {
        "nan": "nan is not a finite number",
        "inf": "inf is not a finite number",
        "1e39": "1e39 is above 1.701e+38",
        "1e-320": "1e-320 is nearer to 0 than 1.175e-38",
    }.items():
        with pytest.raises(click.BadParameter, match=re.escape(reason)):
            convert(_types.Real(), text)
    with pytest.raises(click.BadParameter, match="10000000000 is above 65536"):
        convert(_types.Whole(1, most=_types.RANK), "10000000000")


@pytest.mark.parametrize("kind", [_types.Numbers(), _types.Amounts("threshold")])
@pytest.mark.parametrize("text", ["1e39", "1e-320", "1e999999"])
def test_numbers_in_a_list_are_held_by_float32(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"that float32 holds|is not a number"):
        convert(kind, text)
