"""`python -m distconv.data fetch mnist`: bring a data set here, as compute nodes often have no network."""

from __future__ import annotations

from collections.abc import Sequence

from distconv.comm.start import run_command
from distconv.config import Parser

SETS = ("mnist",)


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.data",
        description="Fetch a data set on a node that has a network, and say where it lies. It is verified; what "
        "is there is not fetched again. It goes into DISTCONV_DATA_DIR if that is set, else into the user's cache.",
        epilog="examples:\n"
        "  python -m distconv.data fetch mnist\n"
        "  DISTCONV_DATA_DIR=$SCRATCH/mnist python -m distconv.data fetch mnist    # and set it in the job, too",
    )
    parser.add_argument("action", choices=("fetch",), metavar="fetch", help="the one thing to do")
    parser.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    flags = parser.parse_args(argv)

    from distconv.data import mnist

    print(f"{flags.name} is in {mnist.fetch()}")
    return 0


if __name__ == "__main__":
    run_command(main)
