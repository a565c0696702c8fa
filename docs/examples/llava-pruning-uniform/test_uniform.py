from llava.pruning.testing import MethodContract


class TestUniform(MethodContract):
    method = "uniform"
