"""Run all hostile inputs and count what went wrong: `python -m tests.hostile [KIND ...]`, or those of some kinds."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.hostile.cases import CASES
from tests.hostile.trial import COUNTED, attempts

if __name__ == "__main__":
    chosen = [case for case in CASES if not sys.argv[1:] or case.kind in sys.argv[1:]]
    wrong, kinds, peak, refused = Counter(), Counter(), (0, ""), 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        for case, found in attempts(chosen, Path(folder)):
            kinds[case.kind] += 1
            refused += found.code == 2
            wrong.update([*found.wrong])
            peak = max(peak, (found.memory, case.title))
            last = found.text.strip().splitlines()[-1:] or [""]
            print(f"{found.code:3} {found.memory >> 20:5} MB {found.seconds:5.1f} s  {case.title}: {last[0][:160]}")
            for what, about in found.wrong.items():
                print(f"    WRONG, {what}: {about}")
            sys.stdout.flush()
    print(f"{len(chosen)} inputs ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), {refused} refused")
    print(", ".join(f"{what} {wrong[what]}" for what in COUNTED))
    print(f"at most {peak[0] / 2**20:,.0f} MB more than before the command ({peak[1]})")
    sys.exit(bool(wrong))
