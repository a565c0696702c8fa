"""`llava.train.train` with FlashAttention 2 (needs the `flash` extra and a GPU)."""

from llava.train.processes import leave_group
from llava.train.train import train

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2")
    leave_group()
