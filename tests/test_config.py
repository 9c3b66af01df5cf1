"""Settings: where they come from, which values are refused and how, and a file that repeats a run."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distconv import train
from distconv.config import Config, flag
from distconv.errors import MissingInputError, UsageError
from distconv.settings import RECIPES, read_settings, read_toml


def parse(*arguments: str | Path) -> Config:
    return read_settings([str(argument) for argument in arguments])[0]


def refused(*arguments: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def toml(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_without_flags_the_source_is_trained_as_the_source_trains_it() -> None:
    config = parse()
    assert (config.model, config.epochs, config.batch_size, config.eval_samples) == ("deepconvnet", 20, 100, 1000)
    assert (config.optimizer, config.lr, config.seed, config.limit_train) == ("adam", 0.001, 0, 0)
    assert (config.data, config.wire, config.device, config.resume) == ("auto", "float16", "auto", "auto")
    assert config == Config()


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    file = toml(tmp_path, 'seed = 5\nlr = 0.25\noptimizer = "sgd"\n')
    config = parse("--seed", "6", "--config", file, "--optimizer", "momentum")
    assert (config.seed, config.lr, config.optimizer, config.epochs) == (6, 0.25, "momentum", 20)
    assert parse("--config", file, "--seed", "0").seed == 0  # given, though it is the default


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "whole number from 1"),
        ("batch_size", -4, "whole number from 1"),
        ("batch_size", 2**31, "whole number from 1 to 2147483647"),
        ("epochs", 0, "whole number from 1"),
        ("seed", -1, "0 to 2^32 - 1"),
        ("seed", 2**32, "0 to 2^32 - 1"),
        ("limit_train", -1, "whole number from 0"),
        ("validation", -1, "whole number from 0"),
        ("eval_samples", -1, "whole number from 0"),
        ("lr", 0.0, "finite number above 0"),
        ("lr", -0.5, "finite number above 0"),
        ("lr", math.nan, "finite number above 0"),
        ("lr", math.inf, "finite number above 0"),
        ("target_accuracy", 1.5, "fraction from 0 to 1"),
        ("target_accuracy", -0.1, "fraction from 0 to 1"),
        ("target_accuracy", math.nan, "fraction from 0 to 1"),
        ("checkpoint_seconds", -1.0, "0 or more"),
        ("checkpoint_seconds", math.nan, "0 or more"),
        ("optimizer", "adamm", "did you mean adam?"),
        ("optimizer", "lion", "one of adam, sgd, momentum, nesterov, adagrad, rmsprop"),
        ("optimizer", "SGD", "did you mean sgd?"),
        ("schedule", "cosinus", "did you mean cosine?"),
        ("schedule", "up", "one of constant, linear, cosine, one-cycle, step, exponential"),
        ("scale_lr", "square", "one of none, linear, sqrt"),
        ("warmup_epochs", -0.5, "0 or more"),
        ("warmup_epochs", math.inf, "0 or more"),
        ("weight_decay", -0.01, "a number from 0"),
        ("weight_decay", math.nan, "a number from 0"),
        ("label_smoothing", 1.0, "a fraction from 0 to below 1"),
        ("ema", 1.0, "a fraction from 0 to below 1"),
        ("ema", math.nan, "a fraction from 0 to below 1"),
        ("wire", "float8", "one of float16"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("model", "resnet", "one of deepconvnet, simpleconvnet, vgg11"),
        ("model", "deepconvnett", "did you mean deepconvnet?"),
        ("data", "", "name of a data set"),
        ("resume", "", "auto, never or a checkpoint file"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_flag_value_and_what_was_expected(
    tmp_path: Path, name: str, value: Any, expected: str
) -> None:
    message = refused(f"{flag(name)}={value}")
    assert all(part in message for part in (flag(name), str(value), expected))
    assert "did you mean" not in message or type(value) is str
    from_file = refused("--config", toml(tmp_path, f"{name} = {value if type(value) is not str else repr(value)}"))
    assert all(part in from_file for part in (name.split("_")[0], str(value), expected))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--lr", "fast"], ("--lr", "fast", "float")),
        (["--epochs", "2.5"], ("--epochs", "2.5", "int")),
        (["--epochs", "1e3"], ("--epochs", "1e3", "int")),
        (["--seed"], ("--seed", "expected one argument")),
        (["--seed", "x", "--sed", "3"], ("--seed", "x", "int")),
        (["--batchsize", "5"], ("--batchsize", "did you mean --batch-size?")),
        (["--learning-rate", "1"], ("--learning-rate", "--help")),
        (["--optimiser=sgd"], ("--optimiser", "did you mean --optimizer?")),
        (["digits"], ("digits", "--help")),
        (["-n", "4"], ("-n", "--help")),
        (["--tensorboard=no"], ("--tensorboard", "no")),
        (["--tensorboard", "no"], ("no", "--help")),
    ],
)
def test_a_flag_that_is_wrong_is_named_with_the_nearest_one(arguments: list[str], parts: tuple[str, ...]) -> None:
    message = refused(*arguments)
    assert all(part in message for part in parts)


def test_a_switch_is_a_flag_without_a_value_and_true_or_false_in_a_file(tmp_path: Path) -> None:
    assert not parse().tensorboard and parse("--tensorboard").tensorboard
    assert parse("--config", toml(tmp_path, "tensorboard = true")).tensorboard
    off = toml(tmp_path, "tensorboard = false")
    assert not parse("--config", off).tensorboard and parse("--config", off, "--tensorboard").tensorboard
    assert "\ntensorboard = true\n" in parse("--tensorboard").toml()


@pytest.mark.parametrize("short", ["--epoch", "--batch", "--opt", "--print", "--conf"])
def test_no_flag_can_be_cut_short(short: str) -> None:
    # Else a script breaks on the day that another flag begins alike.
    assert short in refused(short, "3")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch = 3", ("epoch", "did you mean epochs?")),
        ("wire_format = 'float16'", ("wire_format",)),
        ("[train]\nepochs = 3", ("train",)),
        ("epochs = '3'", ("--epochs", "3", "whole number")),
        ("epochs = 3.0", ("--epochs", "3.0", "whole number")),
        ("epochs = true", ("--epochs", "True", "whole number")),
        ("seed = false", ("--seed", "False", "whole number")),
        ("lr = true", ("--lr", "True", "finite number")),
        ("tensorboard = 1", ("--tensorboard", "1", "true or false")),
        ("tensorboard = 'true'", ("--tensorboard", "true or false")),
        ("lr = '0.1'", ("--lr", "0.1", "finite number")),
        (f"lr = 1{'0' * 400}", ("--lr", "finite number")),  # larger than any float
        ("epochs = [1]", ("--epochs", "[1]", "whole number")),
        ("data = 3", ("--data", "3", "name of a data set")),
        ("out = 1979-05-27", ("--out", "1979-05-27", "text")),
        ("epochs 3", ("run.toml", "TOML", "line 1")),
        ("seed = 1\nepochs = ", ("run.toml", "TOML")),
        ("seed = 1\nseed = 2", ("run.toml", "TOML")),
        (b"out = '\xff\xfe'", ("run.toml", "TOML")),
        (b"\x89PNG\r\n\x1a\n\0", ("run.toml", "TOML")),
        (f"seed = 1{'0' * 5000}", ()),
        ("epochs = " + "[" * 5000 + "]" * 5000, ("run.toml", "lists within lists")),
        ("epochs = " + "{a = " * 1500 + "1" + "}" * 1500, ("run.toml", "lists within lists")),
        ("#" * 20_000, ("run.toml", "16,384 bytes")),
        ("epochs = 3\0", ("run.toml", "TOML")),
        ("[epochs]\nfirst = 1", ("--epochs", "first", "whole number")),
        ("lr = {a = 1}", ("--lr", "finite number")),
        ("lr = 1979-05-27T07:32:00Z", ("--lr", "1979", "finite number")),
        ("lr = 1e999999", ("--lr", "inf", "finite number")),
        ("seed = 0x1" + "0" * 5000, ("--seed", "64 bits")),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_with_a_mistake_is_one_sentence(tmp_path: Path, text: str | bytes, parts: tuple[str, ...]) -> None:
    message = refused("--config", toml(tmp_path, text))
    assert all(part in message for part in parts)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert parse("--config", toml(tmp_path, "\ufeffepochs = 3\r\n")).epochs == 3


@pytest.mark.parametrize("text", [f"epochs = '{'3' * 9000}'", f"{'a' * 9000} = 3", f"epochs = [{'3, ' * 3000}]"])
def test_a_long_mistake_is_a_short_sentence(tmp_path: Path, text: str) -> None:
    assert len(refused("--config", toml(tmp_path, text))) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "zeros", "socket"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(MissingInputError, match=f"{path} is not a file"):
        parse("--config", path)


def test_a_file_that_is_not_there_is_a_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(MissingInputError, match=str(path)):
            parse("--config", path)


def test_a_whole_number_is_a_number_but_no_boolean_is() -> None:
    assert Config(lr=1).lr == 1.0 and type(Config(lr=1).lr) is float  # type: ignore[arg-type]
    for wrong in (
        {"seed": True},
        {"lr": True},
        {"epochs": 1.0},
        {"data": 3},
        {"out": None},
        {"model": ["deepconvnet"]},
    ):
        with pytest.raises(UsageError, match=flag(next(iter(wrong)))):
            Config(**wrong)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toml") / "config.toml"


@settings(max_examples=100, deadline=None)
@given(
    out=st.text(st.characters(exclude_categories=["Cs"])),  # half a surrogate pair is no text
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**32 - 1),
    checkpoint_seconds=st.floats(0),
    tensorboard=st.booleans(),
)
@example(out='a "quoted" \\back\\slash', lr=1e-5, seed=0, checkpoint_seconds=0, tensorboard=True)
@example(out="\0\x01\t\n\r\x1f\x7f\x85\u2028", lr=5e-324, seed=1, checkpoint_seconds=1e22, tensorboard=True)
@example(out="한글 é", lr=1.7976931348623157e308, seed=2, checkpoint_seconds=5, tensorboard=True)
@example(out="runs/🌊", lr=1, seed=3, checkpoint_seconds=5, tensorboard=True)  # beyond 16 bits
@example(out="", lr=1, seed=4, checkpoint_seconds=math.inf, tensorboard=True)  # no checkpoints within epochs
def test_what_is_written_as_toml_is_read_back_the_same(scratch: Path, **changed: Any) -> None:
    config = Config(**changed)
    scratch.write_text(config.toml())
    assert Config(**read_toml(scratch)) == config


def test_print_config_prints_a_file_that_gives_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--lr", "0.5", "--out", "somewhere", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert parse("--config", toml(tmp_path, printed)) == Config(lr=0.5, out="somewhere")
    assert [line.split(" = ")[0] for line in printed.splitlines()] == [f.name for f in dataclasses.fields(Config)]
    assert not Path("somewhere").exists()


def test_what_is_printed_in_place_of_training_is_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--describe: not allowed with argument --print-config"):
        parse("--print-config", "--describe")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_file_says_and_can_be_changed(name: str, tmp_path: Path) -> None:
    found = parse("--recipe", name)
    assert found == Config(**read_toml(RECIPES[name])) != Config()
    file = toml(tmp_path, "epochs = 77\nlr = 0.5\n")
    assert parse("--recipe", name, "--config", file, "--lr", "0.25") == dataclasses.replace(found, epochs=77, lr=0.25)


def test_a_recipe_that_is_none_is_one_sentence_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean mnist-fast"):
        parse("--recipe", "mnist-fst")


def test_help_names_every_flag_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    for name in ("data", "model", "epochs", "batch_size", "lr", "wire", "out", "resume", "target_accuracy", "config"):
        assert flag(name) in words
    assert {"0", "1", "2", "65", "66", "69", "70", "73", "74", "75", "78"} <= set(words)


@pytest.mark.parametrize("variable", ["PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_help_is_printed_on_one_rank_only(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit):
        parse("--help")
    assert train.main(["--print-config"]) == 0
    assert capsys.readouterr().out == ""
