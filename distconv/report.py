"""`python -m distconv.report RUN ...`: what happened in a run, or in several, as one page to look at."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from distconv.comm.start import run_command
from distconv.command_line import Parser, check_file

SECONDS_BETWEEN_PAGES = 5.0


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.report",
        description="Write one HTML page that shows what happened in a run: curves, where the time went, what the wire "
        "lost, mistakes, restarts, and what to try next. Of several runs: their curves over each other, and what "
        "differs. The page needs no network and nothing beside it. A run writes it into its folder when it ends.",
        epilog="examples:\n"
        "  python -m distconv.report runs/mine                    # writes runs/mine/report.html\n"
        "  python -m distconv.report runs/mine --watch            # again and again while the run goes on\n"
        "  python -m distconv.report runs/a runs/b --html ab.html\n"
        "  python -m distconv.report runs/mine --csv mine.csv     # its steps and epochs, a row for each",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="a run's folder, or one of --ensemble")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="(default: report.html in RUN; where several were given, here)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write the page every five seconds until all runs are over; Ctrl-C ends it"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the step and epoch records as a table, too")
    arguments = parser.parse_args(argv)

    # NumPy and Matplotlib, which --help can do without.
    from distconv.run.folder import members
    from distconv.run.report.export import write_csv
    from distconv.run.report.page import PAGE, write_report

    folders = [member for folder in arguments.folders for member in members(folder)]
    path = arguments.html or (arguments.folders[0] if len(arguments.folders) == 1 else Path()) / PAGE
    check_file("--html", arguments.html, ".html")
    check_file("--csv", arguments.csv, ".csv")

    def write() -> bool:
        """Whether a run goes on."""
        histories = write_report(folders, path, writer=f".{os.getpid()}")  # the run may write it at this moment
        if arguments.csv:
            write_csv(arguments.csv, histories)
        return any(history.status == "running" for history in histories)

    running = write()
    print("written to " + " and ".join(str(file) for file in (path, arguments.csv) if file), flush=True)
    if arguments.watch:
        try:
            while running:
                time.sleep(SECONDS_BETWEEN_PAGES)
                running = write()
            print("the end: nothing is running any more")
        except KeyboardInterrupt:
            print("no longer watching")
    return 0


if __name__ == "__main__":
    run_command(main)
