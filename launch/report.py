"""Write report.html of a run: one page with its curves, pictures, results and next commands. Several runs are compared.

A run writes its page when it ends; this command updates it at any time.

python launch/report.py runs/photos                                     writes runs/photos/report.html
python launch/report.py runs/photos runs/photos-large                   writes comparison.html beside the runs
python launch/report.py runs/photos runs/photos-large --out x.html
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.checks import check_parent
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import argument, option
from configs.log import say


@dataclass(frozen=True)
class Options:
    """The command line."""

    runs: tuple[Path, ...] = argument("folders of runs, like runs/photos")
    out: Path | None = option(None, "file to write (default: RUN/report.html; of several, comparison.html beside them)")


def main() -> None:
    """Entry point."""
    options = parse_options(Options, __doc__)
    if options.out:
        check_parent(options.out)
    from launch.reports.page import write_page
    from launch.training.summary import REPORT

    if options.out:
        out = options.out
    elif len(options.runs) == 1:
        out = options.runs[0] / REPORT
    else:
        out = Path(os.path.commonpath([run.resolve().parent for run in options.runs])) / "comparison.html"
    write_page(options.runs, out)
    say(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
