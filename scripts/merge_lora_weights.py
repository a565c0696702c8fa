"""Merges a LoRA adapter (and the projector or merger trained with it) into its base model.

    python scripts/merge_lora_weights.py --model-path ADAPTER --model-base BASE \
        --save-model-path OUT

The result loads like any other checkpoint, without a base.
"""

from llava.errors import errors_as_messages
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import write_checkpoint, write_generation_config
from llava.program_parser import ProgramParser
from llava.train.family import FULL
from llava.train.model_setup import family_of
from llava.train.saving import is_written, portable_config


def merge_lora(model_path: str, model_base: str, save_model_path: str) -> None:
    name = get_model_name_from_path(model_path)
    family = family_of(model_base)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path, model_base, name, device="cpu", torch_dtype=family.merged_dtype()
    )
    family.processor = image_processor
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if is_written(model, name, family)
    }
    write_checkpoint(save_model_path, tensors)
    portable_config(model, save_model_path).save_pretrained(save_model_path)
    write_generation_config(save_model_path, model.generation_config)
    family.save_beside(save_model_path, FULL, tokenizer)


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__)
    parser.add_argument("--model-path", required=True, help="folder of the adapter")
    parser.add_argument("--model-base", required=True, help="folder of the model it was trained on")
    parser.add_argument("--save-model-path", required=True, help="folder to write")
    args = parser.parse_args()
    merge_lora(args.model_path, args.model_base, args.save_model_path)


if __name__ == "__main__":
    main()
