"""Where the settings of a run come from: flag > file (--config) > recipe > default of config.py."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distconv.command_line import Parser, nearest
from distconv.config import EXACT, LONGEST_SHOWN, Config, flag
from distconv.errors import MissingInputError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}
LARGEST_TOML = 1 << 14  # bytes: tomllib's time grows with the square of some files' length


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a file, which may begin with a byte order mark. Raises MissingInputError or UsageError."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe is to wait for its writer
            raise MissingInputError(f"{path} is not a file: give one that --print-config has written")
        with path.open("rb") as file:
            content = file.read(LARGEST_TOML + 1)
        if len(content) > LARGEST_TOML:
            raise UsageError(f"{path} has more than {LARGEST_TOML:,} bytes: settings take fewer than 1,000")
        settings = tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise UsageError(f"{path} is not a TOML file of settings: it has lists within lists") from None
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise UsageError(f"{path} is not a TOML file: {error}") from None
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read: {error.strerror}") from None
    names = [field.name for field in dataclasses.fields(Config)]
    for name in settings:
        if name not in names:
            raise UsageError(f"{path} sets {name[:LONGEST_SHOWN]}, which is no setting{nearest(name, names)}")
    return settings


def read_settings(argv: Sequence[str]) -> tuple[Config, str]:
    """The configuration, and what to print in place of training: print_config, describe or nothing.

    Raises UsageError, MissingInputError.
    """
    parser = Parser(
        prog="python -m distconv.train",
        description="Train a convolutional network, its minibatches shared out among the ranks of an MPI job.",
        epilog="examples:\n"
        "  mpirun -n 4 python -m distconv.train\n"
        "  mpirun -n 2 python -m distconv.train --data mnist --epochs 1 --target-accuracy 0.97\n"
        "  mpirun -n 4 python -m distconv.train --out runs/mine      # again: goes on where it stopped\n"
        "  python -m distconv.train --batch-size 400 --print-config > big.toml\n"
        "  mpirun -n 4 python -m distconv.train --config big.toml --seed 1\n"
        "  python -m distconv.train --model resnet20 --describe\n"
        "  mpirun -n 2 python -m distconv.train --recipe mnist-fast      # 99 % within seconds\n\n"
        "exit codes: 0 done, 1 failure or target missed, 2 usage, 65 bad data, 66 missing input, 69 cannot download,\n"
        "70 replicas differ, 73 cannot create, 74 I/O, 75 stopped on request (run me again), 76 a rank hangs,\n"
        "78 configurations differ",
    )
    for field in dataclasses.fields(Config):
        shown = f" (default: {field.default})" if field.default not in ("", 0, 0.0) else ""
        kind = type(field.default)
        metavar = kind.__name__.upper().replace("STR", "NAME")
        value: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": metavar}
        text = (field.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **value)
    parser.add_argument(
        "--recipe", choices=RECIPES, metavar="NAME", help=f"settings that go together: {', '.join(RECIPES)}; flags win"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with settings; wins over a recipe, and flags over it"
    )
    print_only = {"print_config": "print the settings as TOML and stop", "describe": "print the layers and stop"}
    one = parser.add_mutually_exclusive_group()
    for name, what in print_only.items():
        one.add_argument(flag(name), action="store_true", help=what)
    flags: Mapping[str, Any] = vars(parser.parse_args(argv))
    settings = read_toml(RECIPES[flags["recipe"]]) if flags["recipe"] else {}
    settings |= read_toml(flags["config"]) if flags["config"] else {}
    settings |= {name: value for name, value in flags.items() if name not in ("recipe", "config", *print_only)}
    if settings.get("shards"):
        settings.setdefault("wire", EXACT[0])
    return Config(**settings), next((name for name in print_only if flags[name]), "")
