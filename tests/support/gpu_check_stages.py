"""Stages of a GPU check that end in every way there is."""

from __future__ import annotations

import subprocess
import sys
import time

from rosa_ds.planning.gpu_check.stage import Check, NotRunError


def hangs(check: Check) -> None:
    check.report.write("hangs", "found", {"before": "it hangs"})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    sys.stderr.write(f"started {child.pid}\n")
    sys.stderr.flush()
    time.sleep(300)


def crashes(check: Check) -> None:
    check.report.write("crashes", "found", {"number": 1 / 3, "nothing": [], "words": ["one", "two"]})
    raise RuntimeError("the cause is on the last line")


def lacks(check: Check) -> None:
    raise NotRunError("needs something that is not here")
