"""Write report.html of a run: one page with its curves, pictures, results and next commands.

A run writes it when it ends; this command updates it at any time.

python launch/report.py runs/photos
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.command import Parser
from configs.errors import run_main


def main() -> None:
    """Entry point."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, like runs/photos")
    args = parser.parse_args()
    from launch.training.report import write_report

    print(f"wrote {write_report(args.run)}")


if __name__ == "__main__":
    run_main(main)
