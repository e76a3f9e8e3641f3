"""train.py, which must train with FSDP; see test_gpu.py."""

import sys

from torch.distributed.tensor import DTensor

from retnet import cli
from retnet.commands import train
from retnet.training import loop
from retnet.training.signals import StopRequest

if __name__ == "__main__":
    real = loop.Trainer.run

    def run(self: loop.Trainer, stop: StopRequest) -> bool:
        assert all(isinstance(p, DTensor) for p in self.model.parameters())
        return real(self, stop)

    loop.Trainer.run = run  # type: ignore[method-assign]
    sys.exit(cli.run(train.main))
