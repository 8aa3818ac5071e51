"""Every import of the repository against the one-way rule: tests -> scripts, eval -> weights -> model, data -> components."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "unifashion/**/*.py", "weights/**/*.py", "eval/**/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
)

TESTS, SCRIPTS, WEIGHTS, WIRING, COMPONENT = 4, 3, 2, 1, 0
WIRES = {
    "model", "denoiser", "stableviton", "cpu", "config", "data", "tryon", "caption", "llava", "search", "catalog", "indexing", "sheets", "objectives", "samples", "feed", "training", "parallel", "runs", "seen"
}  # fmt: skip
REFERENCES = {"transformers", "diffusers", "peft"}


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_one_way(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("unifashion/vit.py", "from unifashion.blocks import zero"),
        ("unifashion/vit.py", "from unifashion import qformer"),
        ("unifashion/vit.py", "import unifashion.qformer"),
        ("unifashion/vit.py", "from unifashion import UserError, config"),
        ("unifashion/vit.py", "def late():\n    from unifashion.model import UniFashion"),
        ("unifashion/vit.py", "import timm"),
        ("unifashion/blocks.py", "from unifashion.unet import UNet"),
        ("unifashion/unet.py", "from unifashion.garment import GarmentEncoder"),
        ("unifashion/model.py", "from weights.rename import load_into"),
        ("unifashion/data/toy.py", "import weights"),
        ("unifashion/data/toy.py", "from . import drawing"),
        ("unifashion/training.py", "from transformers import BertModel"),
        ("unifashion/losses.py", "from unifashion.parallel import gather"),
        ("unifashion/objectives.py", "from weights.load import load_public"),
        ("unifashion/samples.py", "import train_phase2"),
        ("unifashion/__init__.py", "from unifashion.model import UniFashion"),
        ("weights/load.py", "import train_phase1"),
        ("weights/load.py", "from eval import retrieval"),
        ("weights/tiny/pretrain.py", "import diffusers.models"),
        ("eval/retrieval.py", "from tests.goldens import load"),
        ("eval/retrieval.py", "import peft"),
        ("infer.py", "from tests import parity"),
        ("infer.py", "import transformers"),
    ],
)
def test_a_planted_violation_is_caught(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("unifashion/unet.py", "from unifashion.blocks import UNetConfig\nfrom unifashion import UserError"),
        ("unifashion/tokenizers.py", "import re\nimport sentencepiece\nfrom torch import Tensor"),
        ("unifashion/model.py", "from unifashion import diffusion, vit\nfrom unifashion.config import FULL"),
        ("weights/load.py", "from unifashion.model import UniFashion\nfrom weights.rename import load_into"),
        ("infer.py", "from weights.load import load_public\nfrom unifashion import UserError"),
        ("eval/peers.py", "import diffusers\nimport transformers"),
        ("tests/test_vit.py", "import transformers\nimport infer\nfrom eval.metrics import recall"),
    ],
)
def test_a_rightful_import_is_not_caught(path, source):
    assert violations(path, source) == []


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (from the root) imports and must not, one line each."""
    level = layer(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = []
    for module in imported(ast.parse(source)):
        above = layer(module)
        if module.startswith("."):
            found.append(f"{path}: relative import {module}")
        elif above is not None and above > level:
            found.append(f"{path}: {module} is above it")
        elif level == COMPONENT and not component_may(path, module):
            found.append(f"{path}: a component imports {module}")
        elif module.split(".")[0] in REFERENCES and level != TESTS and path != "eval/peers.py":
            found.append(f"{path}: {module} is a reference, for tests only")
    return found


def imported(tree: ast.AST) -> list[str]:
    """Modules named by every import statement, those inside functions too; `from unifashion import x` is unifashion.x."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            packages = ("unifashion", "unifashion.data", "weights", "eval", "tests")
            names = [alias.name for alias in node.names if module in packages]
            modules += [f"{module}.{name}" for name in names] or [module]
    return modules


def layer(module: str) -> int | None:
    """Where a module of ours stands; None for everybody else's."""
    top, _, rest = module.partition(".")
    if top == "tests":
        return TESTS
    if top == "eval" or (ROOT / f"{top}.py").exists() or top in ("infer", "train_phase1", "train_phase2"):
        return SCRIPTS
    if top == "weights":
        return WEIGHTS
    if top == "unifashion":
        return WIRING if rest.split(".")[0] in WIRES else COMPONENT
    return None


def component_may(path: str, module: str) -> bool:
    top = module.split(".")[0]
    if top == "unifashion":
        shared = path in ("unifashion/unet.py", "unifashion/garment.py") and module.startswith(
            "unifashion.blocks"
        )
        return shared or module == "unifashion.UserError"
    return top in {"torch", "einops", "numpy", "PIL", "sentencepiece", *sys.stdlib_module_names}
