"""The end of a training in several processes."""

from __future__ import annotations

import torch.distributed as dist


def leave_group() -> None:
    """Waits for the other processes of this training and lets go of them; alone, does nothing.

    A process that exits while it is still connected may abort, and the launcher then stops the
    others, which may still be saving.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
