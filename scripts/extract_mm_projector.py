"""Copies the projector (and newline embedding) of a checkpoint into one file.

    python scripts/extract_mm_projector.py --model-path CHECKPOINT --output mm_projector.bin

The output is what `--pretrain_mm_mlp_adapter` and a projector-only folder expect. With a name that
ends in .safetensors it is written in that format.
"""

import os

import torch
from safetensors.torch import save_file

from llava.errors import errors_as_messages
from llava.llava_hf import name_here
from llava.program_parser import ProgramParser
from llava.weight_files import tensors_in, weight_files

PARTS = ("mm_projector", "image_newline")


def extract(model_path: str, output: str) -> None:
    found = {
        name_here(name): tensor.clone()
        for path in weight_files(model_path)
        for name, tensor in tensors_in(path)
        if any(part in name_here(name) for part in PARTS)
    }
    if not found:
        raise SystemExit(f"{model_path} holds no projector weights")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    if output.endswith(".safetensors"):
        save_file(found, output, metadata={"format": "pt"})
    else:
        torch.save(found, output)


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--output", required=True, help="file to write")
    args = parser.parse_args()
    extract(args.model_path, args.output)


if __name__ == "__main__":
    main()
