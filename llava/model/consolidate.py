"""Rewrites a checkpoint in float16 safetensors.

    python -m llava.model.consolidate --src CHECKPOINT --dst OUT

Weights of a vision tower that was not trained along are left out: the tower has its own folder.
"""

import torch

from ..checkpoint_kind import values_in
from ..errors import errors_as_messages
from ..program_parser import ProgramParser
from ..progress import progress
from ..weight_files import tensors_in, weight_files
from .checkpoint import TOWER_PREFIX, is_ignored, write_checkpoint
from .utils import auto_upgrade


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    auto_upgrade(src_path)
    own_tower = values_in(src_path).get("unfreeze_mm_vision_tower", False)
    tensors = {}
    for path in progress(weight_files(src_path), "reading", "files"):
        for name, tensor in tensors_in(path):
            if not is_ignored(name) and (own_tower or not name.startswith(TOWER_PREFIX)):
                dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
                tensors[name] = tensor.to(dtype, copy=True)
    write_checkpoint(dst_path, tensors, like=src_path, torch_dtype="float16")


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__)
    parser.add_argument("--src", required=True, help="checkpoint folder")
    parser.add_argument("--dst", required=True, help="folder to write")
    args = parser.parse_args()
    consolidate_ckpt(args.src, args.dst)


if __name__ == "__main__":
    main()
