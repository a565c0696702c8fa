"""The entry point of Nüwa's release, under the name it has there.

from nuwa import nuwa

model = nuwa(model, matain_token=64, distance=280)
"""

from llava.pruning.nuwa import nuwa

__all__ = ["nuwa"]
