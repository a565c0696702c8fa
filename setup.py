"""Package, dependencies and extras. Tool settings: pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "llava/__init__.py").read_text()).group(1)

EXTRAS = {
    "serve": [
        "gradio>=6.17,<7",
        "fastapi",
        "uvicorn>=0.54,<0.55",  # llava/serve/connections.py overrides its protocol for HTTP/1.1
        "h11>=0.16,<0.17",
        "httpx",
        "httpx-sse>=0.4.3,<0.5",
        "python-multipart>=0.0.30,<0.1",  # Python 3.10 has none from 0.0.33 on
        "pydantic>=2",
    ],
    "train": ["peft>=0.10,<0.12"],  # newer ones break the Trainer of the pinned transformers
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],  # the range that the tests of training were run with
    "eval": ["matplotlib", "openpyxl"],
    "quant": ["bitsandbytes"],
    "flash": ["flash-attn"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],  # site
    "gpu": ["pytest"],  # scripts/gpu_report.sh
    "video": ["av"],  # frames of video files; folders of frames and animations need nothing
}
EXTRAS["dev"] = [
    "pytest",
    "pytest-xdist>=3.2",
    "hypothesis",
    "mypy==2.4.1",  # another one finds other things
    "ruff>=0.17,<0.18",
    *EXTRAS["train"],
    # Linux alone: built from source in seconds, nothing is compiled.
    *(f"{name}; sys_platform == 'linux'" for name in EXTRAS["deepspeed"]),
    *EXTRAS["eval"],
    *EXTRAS["serve"],
    *EXTRAS["docs"],
]

MANIFEST = (ROOT / "MANIFEST.in").read_text()


class BuildPy(build_py):
    """Puts copies of what MANIFEST.in includes where `llava/clone_files.py` looks for them."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # the clone itself is read
        for name in re.findall(r"^include (.+)$", MANIFEST, re.MULTILINE):
            copy = Path(self.build_lib, "llava", "clone", name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / name), str(copy))


setup(
    name="llava",
    version=VERSION,
    description="LLaVA with every visual-token-pruning method behind one interface",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(include=["llava", "llava.*"]),
    # names under which releases offer their methods
    py_modules=[path.stem for path in ROOT.glob("*.py") if path.name != "setup.py"],
    package_data={"llava": ["py.typed"], "llava.eval": ["table/*.json"]},
    cmdclass={"build_py": BuildPy},
    install_requires=[
        "torch>=2.6",
        "transformers==4.37.2",
        "accelerate>=0.28",
        "sentencepiece",
        "protobuf",  # transformers reads sentencepiece models of newer Llama tokenizers with it
        "safetensors",
        "pillow>=10.1,<13",  # 13 resizes portrait images in another pass order: other pixels
        "numpy",
        "requests",
        "shortuuid",
        "tqdm",
        "urllib3>=2",  # part of requests: how often a judge is asked again
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["llava = llava.command:main"],
        "lmms_eval.models": ["llava_pruning = llava.eval.plugins.lmms:manifest"],
        "vllm.general_plugins": ["llava_pruning = llava.vllm_plugin:register"],
    },
)
