"""The InceptionV3 of FID in torchvision's layout -> `eval.metrics.inception.InceptionV3`.

TensorFlow's weights of 2015-12-05, which pytorch-fid carried over, and torch-fidelity from the same file; the latter wrote no
counters. torchvision's own `inception_v3` is another network, trained anew: its AuxLogits have no row here, it is refused.
Our names count: blocks.BLOCK.BRANCH.STEP, and behind a fork once more.
"""

from pathlib import Path

from torch import nn

from unifashion import UserError
from weights.containers import read_checkpoint
from weights.files import find, source_of
from weights.rename import Table, load_into, naming, under

HERE = Path(__file__).parent
NUMBERS = 21_820_000  # parameters and running statistics, without `fc`
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")

# fmt: off
CONVOLUTION: Table = {
    # original                ours
    "conv.weight":            "conv.weight",
    "bn.weight":              "norm.weight",
    "bn.bias":                "norm.bias",
    "bn.running_mean":        "norm.running_mean",
    "bn.running_var":         "norm.running_var",
    "bn.num_batches_tracked": None,  # counts training batches; only torchvision's class asks for it
}

STEM = {
    "Conv2d_1a_3x3":   "0",
    "Conv2d_2a_3x3":   "1",
    "Conv2d_2b_3x3":   "2",
    "Conv2d_3b_1x1":   "4",
    "Conv2d_4a_3x3":   "5",
}
A = {
    "branch1x1":       "0.0",
    "branch5x5_1":     "1.0",
    "branch5x5_2":     "1.1",
    "branch3x3dbl_1":  "2.0",
    "branch3x3dbl_2":  "2.1",
    "branch3x3dbl_3":  "2.2",
    "branch_pool":     "3.1",
}
B = {
    "branch3x3":       "0.0",
    "branch3x3dbl_1":  "1.0",
    "branch3x3dbl_2":  "1.1",
    "branch3x3dbl_3":  "1.2",
}
C = {
    "branch1x1":       "0.0",
    "branch7x7_1":     "1.0",
    "branch7x7_2":     "1.1",
    "branch7x7_3":     "1.2",
    "branch7x7dbl_1":  "2.0",
    "branch7x7dbl_2":  "2.1",
    "branch7x7dbl_3":  "2.2",
    "branch7x7dbl_4":  "2.3",
    "branch7x7dbl_5":  "2.4",
    "branch_pool":     "3.1",
}
D = {
    "branch3x3_1":     "0.0",
    "branch3x3_2":     "0.1",
    "branch7x7x3_1":   "1.0",
    "branch7x7x3_2":   "1.1",
    "branch7x7x3_3":   "1.2",
    "branch7x7x3_4":   "1.3",
}
E = {
    "branch1x1":       "0.0",
    "branch3x3_1":     "1.0",
    "branch3x3_2a":    "1.1.0.0",
    "branch3x3_2b":    "1.1.1.0",
    "branch3x3dbl_1":  "2.0",
    "branch3x3dbl_2":  "2.1",
    "branch3x3dbl_3a": "2.2.0.0",
    "branch3x3dbl_3b": "2.2.1.0",
    "branch_pool":     "3.1",
}


def block(prefix: str, our_prefix: str, names: dict[str, str]) -> Table:
    """The rows of all the convolutions in `names`."""
    rows: Table = {}
    for original, ours in names.items():
        rows |= under(f"{prefix}{original}.", f"{our_prefix}{ours}.", CONVOLUTION)
    return rows


INCEPTION: Table = {
    **block("",          "stem.",      STEM),
    **block("Mixed_5b.", "blocks.0.",  A),
    **block("Mixed_5c.", "blocks.1.",  A),
    **block("Mixed_5d.", "blocks.2.",  A),
    **block("Mixed_6a.", "blocks.3.",  B),
    **block("Mixed_6b.", "blocks.4.",  C),
    **block("Mixed_6c.", "blocks.5.",  C),
    **block("Mixed_6d.", "blocks.6.",  C),
    **block("Mixed_6e.", "blocks.7.",  C),
    **block("Mixed_7a.", "blocks.8.",  D),
    **block("Mixed_7b.", "blocks.9.",  E),
    **block("Mixed_7c.", "blocks.10.", E),
    "fc.*":                            None,  # 1008 classes, of which FID reads nothing
}
# fmt: on


def load_inception(network: nn.Module, folder: Path = HERE / "files") -> None:
    """
    Fill `network`, an InceptionV3, from the first of FILES that is in `folder`.

    Raises UserError, in one line, if there is none, which says where to get it, and if it is damaged or another network's.
    """
    path = find(folder, *FILES)
    if path is None:
        raise UserError(f"{folder / FILES[0]} is missing: FID and KID need it, {source_of(FILES[0])}")
    with naming(path, "is not FID's Inception"):
        load_into(network, read_checkpoint(path), INCEPTION)
