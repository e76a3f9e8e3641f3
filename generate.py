"""Continue a text with a model: python generate.py runs/tiny-retention --prompt TEXT"""

import retnet_commands

if __name__ == "__main__":
    retnet_commands.generate()
