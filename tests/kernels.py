"""How many kernels a GPU would be asked to run, counted on the CPU."""

import torch

from llava.eval.efficiency.launches import Launches


@torch.inference_mode()
def kernels(call) -> list[str]:
    """The names of the operations that `call()` runs. In inference mode a linear layer, a norm and
    attention are one, which they are on a GPU; elsewhere torch splits norms up for the CPU."""
    with Launches() as launches:
        call()
    return launches.names
