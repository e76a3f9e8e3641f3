"""Compare trained models: python compare.py runs/tiny-retention runs/tiny-attention"""

import retnet_commands

if __name__ == "__main__":
    retnet_commands.compare()
