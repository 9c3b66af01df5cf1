"""Parameters saved by the source system: a pickle of a dict of arrays 'W1', 'b1', 'W2', ... Read, never written."""

from __future__ import annotations

from pathlib import Path

from distconv.data.unpickler import PickledArray, load
from distconv.errors import BadDataError
from distconv.run.layout import FileArrays

MOST_SHARING = 10  # times the bytes of the file that its arrays may have together


def read_pickle(path: Path) -> FileArrays:
    """What a file's dict holds, by name; None for what is no array of floats: a text, say.

    Raises BadDataError for anything else than a pickled dict whose names are texts, OSError.
    """
    program = path.read_bytes()
    try:
        content = load(program)
    except Exception as error:  # a broken pickle can raise nearly anything
        why = f"{str(error)[:200]}; nothing of it was run"
        raise BadDataError(f"{path} is neither an .npz nor a pickle of arrays: {why}") from None
    if not isinstance(content, dict):
        kind = "ndarray" if isinstance(content, PickledArray) else type(content).__name__
        raise BadDataError(f"{path} holds a {kind}, but a dict of arrays 'W1', 'b1', ... was expected")
    for name in content:
        if not isinstance(name, str):
            raise BadDataError(f"{path} has a {type(name).__name__} for a name, but 'W1', 'b1', ... were expected")
    arrays = {name: value.array if isinstance(value, PickledArray) else None for name, value in content.items()}
    if sum(array.nbytes for array in arrays.values() if array is not None) > MOST_SHARING * len(program):
        raise BadDataError(f"{path} has the same bytes in too many arrays, which would take long to look at")
    return {name: array if array is not None and array.dtype.kind == "f" else None for name, array in arrays.items()}
