"""Training: configuration, loop, run folder, tracking."""

from retnet.training.config import key_of, load_config, to_yaml
from retnet.training.run import check_run, train
from retnet.training.spec import Config, describe_keys
