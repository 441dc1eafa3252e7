"""medvlm's command line; in its first ``HOLDS`` starts under Slurm, training waits for a signal after its second step.

So a test meets a run in the middle, however fast the machine is. Nothing of the run is changed: step, then wait.
"""

import os
import select
import signal

from medvlm import cli
from medvlm.training.meters import Meters

SECONDS = 120


def main() -> None:
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ.get("HOLDS", 0)):
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)  # gets a byte with each signal that training handles
        begin, write = Meters.__init__, Meters.write

        def begin_and_note(self, folder, start, *arguments, **options):
            begin(self, folder, start, *arguments, **options)
            self.hold_at = start + 2

        def write_and_hold(self, record):
            write(self, record)
            if record["step"] == self.hold_at:
                print(f"holding at step {record['step']}", flush=True)
                assert select.select([woken], [], [], SECONDS)[0], "no signal came"

        Meters.__init__, Meters.write = begin_and_note, write_and_hold
    cli.main()
