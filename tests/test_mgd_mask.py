"""MGD's mask: equal to the original's, on its samples too, and for Dress Code equal to its rules written out pixel by pixel."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import goldens
from unifashion.data.mgd_mask import DRESSCODE, VITONHD, arm_band, mgd_masks

SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"), "viton_multimodal")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs MGD's samples: set UNIFASHION_SAMPLES")
JOINTS = np.array(  # nose, neck, then shoulder, elbow, wrist of the right side and of the left
    [(190, 60), (190, 110), (140, 115), (120, 190), (110, 260), (240, 105), (262, 180), (270, 250)], float
)


@pytest.mark.parametrize("i", range(5))
def test_masks_are_the_originals(golden, i):
    parse, joints = picture(golden, i), golden.inputs[f"keypoints_{i}"].numpy()
    size = tuple(golden.config["size"])
    masks = mgd_masks(parse, joints, (1024, 768), VITONHD, size)
    assert np.array_equal(masks.repaint, golden.outputs[f"inpaint_mask_{i}"][0].numpy())
    assert np.array_equal(masks.hands, golden.outputs[f"hands_{i}"].numpy())
    kept = np.where(masks.region, 0, np.asarray(parse.resize(size[::-1], Image.Resampling.NEAREST)))
    assert np.array_equal(kept, golden.outputs[f"parse_total_{i}"].numpy())
    assert masks.region.any() and masks.hands.any() and (masks.repaint >= masks.region).all()


def test_the_mask_at_full_size_is_the_originals(golden):
    masks = mgd_masks(picture(golden, 5), golden.inputs["keypoints_5"].numpy(), (1024, 768), VITONHD)
    assert np.array_equal(masks.repaint, golden.outputs["full_inpaint_mask"][0].numpy())


@needs_samples
@pytest.mark.parametrize("name", ["12419_00", "03191_00"])
def test_the_masks_of_real_persons_in_viton_hd_are_the_rules(name):
    folder = SAMPLES / "vitonhd/test"
    parse = Image.open(folder / f"image-parse-v3/{name}.png")
    people = json.loads((folder / f"openpose_json/{name}_keypoints.json").read_text())["people"]
    joints = np.reshape(people[0]["pose_keypoints_2d"], (25, 3))
    masks = mgd_masks(parse, joints, parse.size[::-1], VITONHD)
    label = np.asarray(parse.resize((384, 512), Image.Resampling.NEAREST))
    band = arm_band(joints[:, :2] / 2, (512, 384), 90)
    fixed = np.isin(label, [1, 2, 4, 9, 12, 13, 18, 19]) | (np.isin(label, [14, 15]) & ~band)
    assert np.array_equal(masks.repaint, boxed((np.isin(label, [5, 6, 7]) | band) & ~fixed, fixed))
    assert 0.325 <= masks.repaint.mean() <= 0.355  # as MGD's own code gave: notes/diffusion.md 3
    assert masks.repaint[np.isin(label, [5, 6, 7])].mean() > 0.99


@needs_samples
@pytest.mark.parametrize(
    "path",
    [
        *("dresses/052012", "dresses/051994", "upper_body/048462", "upper_body/048466"),
        *("lower_body/050855", "lower_body/050915"),
    ],
)
def test_the_masks_of_real_persons_in_dress_code_are_the_rules(path):
    kind, name = path.split("/")
    parse = Image.open(SAMPLES / f"dresscode/{kind}/label_maps/{name}_4.png")
    joints = np.array(
        json.loads((SAMPLES / f"dresscode/{kind}/keypoints/{name}_2.json").read_text())["keypoints"]
    )
    masks = mgd_masks(parse, joints, (512, 384), DRESSCODE[kind])
    label = np.asarray(parse.resize((384, 512), Image.Resampling.NEAREST))
    assert np.array_equal(masks.repaint, dresscode_rules(label, joints[:, :2], kind))
    own = {"dresses": 7, "upper_body": 4, "lower_body": 6}[kind]
    assert masks.repaint[label == own].mean() > 0.98 and 0.1 < masks.repaint.mean() < 0.75


@pytest.mark.parametrize("kind", DRESSCODE)
@pytest.mark.parametrize("seed", range(3))
def test_every_label_of_dress_code_is_treated_as_its_rules_say(kind, seed):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 18, (16, 12), dtype=np.uint8))
    label = np.zeros((512, 384), np.uint8)
    label[60:420, 40:330] = np.asarray(coarse.resize((290, 360), Image.Resampling.NEAREST))
    masks = mgd_masks(Image.fromarray(label), JOINTS, (512, 384), DRESSCODE[kind])
    assert np.array_equal(masks.repaint, dresscode_rules(label, JOINTS, kind))


def test_the_arms_band_leaves_out_what_is_unknown():
    band = lambda joints: arm_band(np.array(joints, float), (512, 384), 9)  # noqa: E731
    at = lambda picture, j: picture[int(JOINTS[j, 1]), int(JOINTS[j, 0])]  # noqa: E731
    for gone, seen in (
        ([], [2, 3, 4, 5, 6, 7]),
        ([4], [2, 3, 5, 6, 7]),
        ([4, 3], [2, 5, 6, 7]),
        ([7], [2, 3, 4, 5, 6]),
        ([7, 6], [2, 3, 4, 5]),
    ):
        joints = JOINTS.copy()
        joints[gone] = 0
        picture = band(joints)
        assert [j for j in range(2, 8) if at(picture, j)] == seen
        assert not picture[:20, :20].any()  # no line to the corner where unknown joints lie
    joints = JOINTS.copy()
    joints[4] = -1  # Dress Code's way
    assert not band(joints)[:20, :20].any() and band(joints).any()


def test_without_shoulders_the_head_stays_whole():
    label = np.zeros((512, 384), np.uint8)
    label[40:130, 150:230] = 11
    label[130:300, 120:260] = 4
    for shoulder in (2, 5):
        joints = JOINTS.copy()
        joints[shoulder] = 0
        whole = mgd_masks(Image.fromarray(label), joints, (512, 384), DRESSCODE["upper_body"])
        assert not whole.repaint[label == 11].any()
    cut = mgd_masks(Image.fromarray(label), JOINTS, (512, 384), DRESSCODE["upper_body"])
    assert not cut.repaint[40:84, 150:230].any() and cut.repaint[96:130, 150:230].all()


def test_skirts_are_repainted_as_trousers_are():
    label = np.zeros((512, 384), np.uint8)
    label[200:300, 100:280] = 5
    masks = mgd_masks(Image.fromarray(label), JOINTS, (512, 384), DRESSCODE["lower_body"])
    assert masks.repaint[label == 5].all() and not masks.repaint[:180].any()


def test_a_picture_without_garment_and_arms_has_an_empty_mask():
    masks = mgd_masks(Image.new("L", (30, 40)), np.zeros((18, 2)), (512, 384), DRESSCODE["lower_body"])
    assert masks.repaint.shape == (512, 384) and not masks.repaint.any()


@pytest.fixture(scope="module")
def golden() -> goldens.Golden:
    return goldens.load("mgd_masks")


def picture(golden: goldens.Golden, i: int) -> Image.Image:
    return Image.fromarray(golden.inputs[f"parse_{i}"].numpy())


def boxed(region: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(region)
    box = np.zeros_like(region)
    box[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    return box & ~fixed


def dresscode_rules(label: np.ndarray, joints: np.ndarray, kind: str) -> np.ndarray:
    """Labels by name, the neck's line by a fit, growing by shifts: MGD's rules at 512x384, said another way.

    One differs on purpose: MGD repaints no skirt of lower_body, whose wearer would go on wearing it.
    """
    names = "background hat hair sunglasses upper skirt pants dress belt left_shoe right_shoe head left_leg right_leg left_arm right_arm bag scarf"
    where = {name: label == i for i, name in enumerate(names.split())}
    among = lambda *names: np.any([where[name] for name in names], 0)  # noqa: E731
    legs, arms = among("left_leg", "right_leg"), among("left_arm", "right_arm")
    fixed = among("hat", "hair", "sunglasses", "left_shoe", "right_shoe", "bag", "scarf")
    head = among("hat", "hair", "sunglasses", "head")
    band = arm_band(joints, (512, 384), 45)
    if kind == "lower_body":
        region, fixed = where["pants"] | where["skirt"] | legs, fixed | where["upper"] | arms | head
    else:
        slope, height = np.polyfit(*joints[[2, 5]].T, 1)
        limit = (slope * np.arange(384) + height - 20).astype(int)
        high = np.arange(512)[:, None] < limit
        region = (
            {"dresses": where["dress"] | legs, "upper_body": where["upper"]}[kind] | band | (head & ~high)
        )
        fixed = fixed | (head & high) | (arms & ~band)
        if kind == "upper_body":
            fixed = fixed | among("skirt", "pants")
    padded = np.pad(region, 10)
    columns = np.any([padded[:, i : i + 384] for i in range(21)], 0)
    grown = np.any([columns[i : i + 512] for i in range(21)], 0)
    return boxed(grown & ~fixed, fixed)
