"""Writes the difference between a model and its base.

    python -m llava.model.make_delta --base-model-path BASE --target-model-path MODEL \
        --delta-path OUT [--hub-repo-id NAME]
"""

from ..errors import errors_as_messages
from ..program_parser import ProgramParser
from ..weight_files import local_folder
from .checkpoint import write_checkpoint
from .delta import combine, read_weights


def make_delta(
    base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None = None
) -> None:
    """hub_repo_id: repository the result is uploaded to; None keeps it local."""
    target = local_folder(target_model_path)
    tensors = combine(read_weights(target), read_weights(local_folder(base_model_path)), sign=-1)
    write_checkpoint(delta_path, tensors, like=target, torch_dtype="float16")
    if hub_repo_id:
        from huggingface_hub import HfApi

        HfApi().upload_folder(repo_id=hub_repo_id, folder_path=delta_path)


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__)
    parser.add_argument("--base-model-path", required=True, help="folder of the language model")
    parser.add_argument("--target-model-path", required=True, help="folder of the trained model")
    parser.add_argument("--delta-path", required=True, help="folder to write")
    parser.add_argument("--hub-repo-id", help="upload the result to this repository")
    args = parser.parse_args()
    make_delta(args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id)


if __name__ == "__main__":
    main()
