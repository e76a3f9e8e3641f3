"""Train a RetNet or the same-size Transformer: python train.py configs/tiny.yaml [key=value ...]"""

import retnet_commands

if __name__ == "__main__":
    retnet_commands.train()
