"""What the file of --fsdp_config says is followed or refused."""

import json
import os
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from llava.train.arguments import TrainingArguments
from llava.train.fsdp import announce_prefetch, check_fsdp, check_fsdp_devices, settle_fsdp
from llava.train.run import own_precision
from llava.train.train import prepare
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def own_environment():
    """Arguments of a training leave their mark in the environment."""
    with own_precision():
        yield


def arguments(tmp_path, **keys):
    (tmp_path / "fsdp.json").write_text(json.dumps(keys))
    return TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, fsdp="full_shard auto_wrap",
        fsdp_config=str(tmp_path / "fsdp.json"),
    )  # fmt: skip


def test_the_shipped_file_is_followed(tmp_path):
    check_fsdp(arguments(tmp_path, **json.loads((ROOT / "scripts/fsdp.json").read_text())))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_checkpointing": "true"}, "--gradient_checkpointing True saves the same"),
        ({"shard_size": 3}, "there is no key shard_size, choose from min_num_params, "),
        ({"backward_prefetch": "early"}, "'early' is unknown, choose from backward_pre, "),
        ({"xla": True}, "there is no key xla"),
    ],
)
def test_a_key_that_cannot_be_followed_is_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=f"--fsdp_config: .*{message}"):
        check_fsdp(arguments(tmp_path, **keys))


def test_keys_that_transformers_leaves_unread_reach_accelerate(tmp_path):
    keys = {"limit_all_gathers": "false", "fsdp_backward_prefetch": "backward_pre"}
    args = arguments(tmp_path, **keys, forward_prefetch=True, activation_checkpointing=False)
    check_fsdp(args)
    announce_prefetch(args)
    assert os.environ["FSDP_BACKWARD_PREFETCH"] == "BACKWARD_PRE"
    assert os.environ["FSDP_FORWARD_PREFETCH"] == "true"
    settle_fsdp(plugin := SimpleNamespace(limit_all_gathers=True), args)
    assert plugin.limit_all_gathers is False


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_what_accelerate_would_leave_out_is_refused(tmp_path, kind):
    args = arguments(tmp_path)
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType(kind))
    if kind == "MULTI_GPU":
        return check_fsdp_devices(args)
    with pytest.raises(ValueError, match="--fsdp full_shard auto_wrap splits a model between GPUs"):
        check_fsdp_devices(args)


def test_a_run_on_the_cpu_does_not_pretend_to_be_split(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    words = f"--data_path {tmp_path}/data.json --output_dir {tmp_path} --use_cpu True".split()
    with pytest.raises(ValueError, match="leave it out on the CPU"):
        prepare([*words, "--report_to", "none", "--fsdp", "full_shard auto_wrap"])
