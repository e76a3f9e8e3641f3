"""Training: configuration, loop, run folder, tracking."""

from retnet.training.config import Config, load_config, to_yaml
from retnet.training.keys import describe_keys
from retnet.training.run import train
