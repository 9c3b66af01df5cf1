"""A user's own model or data set, named on the command line as package.module:function."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distconv.errors import UsageError
from distconv.formatting import plural


def is_factory(name: str) -> bool:
    """Whether a name looks like package.module:function rather than a word or a folder."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_factory(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules in the current folder are found too.

    Raises UsageError where there is none; what the module itself raises while it is imported comes through.
    """
    module_name, _, function_name = name.partition(":")
    with contextlib.suppress(FileNotFoundError):  # somebody has removed it
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own module wants
        advice = "run from its folder, or set PYTHONPATH"
        if module_name.endswith(".py"):
            advice = f"a module is named without .py, {name.replace('.py:', ':')} say"
        raise UsageError(f"{name}: there is no module {error.name}: {advice}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{name}: the module {module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]


def call_factory(name: str, *arguments: Any) -> Any:
    """What the function that `package.module:function` names gives for these arguments.

    Raises UsageError where there is none or it does not take them; what it raises itself comes through.
    """
    return load_taking(name, *arguments)(*arguments)


def load_taking(name: str, *arguments: Any) -> Callable[..., Any]:
    """The function that `package.module:function` names, which takes such arguments. Raises as call_factory does."""
    function = load_factory(name)
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:
        pass  # a function of C, which does not tell what it takes
    except TypeError as error:
        count = plural(len(arguments), "argument")
        raise UsageError(f"{name} is called with {count}, which it does not take: {error}") from None
    return function
