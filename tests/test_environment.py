"""Tests do not depend on what users export."""

from tests.environment import forget, read_by_scripts


def test_settings_for_programs_and_scripts_are_forgotten_and_the_rest_stays():
    stays = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/x", "GPU_TESTS_FILE": "f"}
    settings = ("DATA_DIR", "LAUNCHER", "ZERO", "twig_K", "OPENAI_BASE_URL", "JUDGE_MODEL")
    proxies = ("HTTP_PROXY", "https_proxy", "ALL_PROXY", "no_proxy")
    environment = dict.fromkeys((*settings, *proxies, "RANK", "COLUMNS", "LLAVA_CAPTURE"), "own")
    forget(environment := environment | stays)
    assert environment == stays | {"COLUMNS": "80"}
    assert {"CKPT", "LIMIT", "MODEL", "PYTHON", "VIRTUAL_ENV"} <= read_by_scripts()
