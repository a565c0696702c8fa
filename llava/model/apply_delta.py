"""Makes a model from its base and published differences.

    python -m llava.model.apply_delta --base-model-path BASE --target-model-path OUT \
        --delta-path DELTA
"""

from ..errors import errors_as_messages
from ..program_parser import ProgramParser
from ..weight_files import local_folder
from .checkpoint import write_checkpoint
from .delta import combine, read_weights


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    delta = local_folder(delta_path)
    tensors = combine(read_weights(delta), read_weights(local_folder(base_model_path)), sign=1)
    write_checkpoint(target_model_path, tensors, like=delta, torch_dtype="float16")


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__)
    parser.add_argument("--base-model-path", required=True, help="folder of the language model")
    parser.add_argument("--target-model-path", required=True, help="folder to write")
    parser.add_argument("--delta-path", required=True, help="folder of the difference to it")
    args = parser.parse_args()
    apply_delta(args.base_model_path, args.target_model_path, args.delta_path)


if __name__ == "__main__":
    main()
