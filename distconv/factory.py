"""A user's own model or data set, named on the command line as package.module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distconv.errors import UsageError


def is_factory(name: str) -> bool:
    """Whether a name looks like package.module:function rather than a word or a folder."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_factory(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules in the current folder are found too.

    Raises UsageError where there is none; what the module itself raises while it is imported comes through.
    """
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own module wants
        raise UsageError(f"{name}: there is no module {error.name}: run from its folder, or set PYTHONPATH") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{name}: the module {module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]
