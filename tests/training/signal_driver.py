"""train.py, of whose processes the one of rank 1 gets SIGTERM in step 4; see test_parallel.py."""

import os
import signal
import sys

from retnet import cli
from retnet.commands import train
from retnet.training import loop

if __name__ == "__main__":
    real = loop.Trainer._seed

    def seed(self: loop.Trainer, step: int, micro_step: int) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        real(self, step, micro_step)

    loop.Trainer._seed = seed  # type: ignore[method-assign]
    sys.exit(cli.run(train.main))
