"""FID, KID and clean-fid's resize against five libraries' numbers (fid_kid.json), and what is offered beside them."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from eval.metrics import fid as module
from eval.metrics.fid import (
    caution,
    clean_resize,
    features,
    fid,
    fid_floor,
    kid,
    kid_interval,
    kid_of_pairs,
    kid_subsets,
)
from tests.faults import plant
from tests.goldens import GOLDEN
from unifashion import UserError
from unifashion.preprocess import read_image

GOLD = json.loads((GOLDEN / "fid_kid.json").read_text())
RANDOM, TINY = GOLD["random_300_250_16"], GOLD["tiny"]
exactly = partial(pytest.approx, rel=1e-9, abs=1e-9)


# The numbers of five libraries


def test_fid_equals_the_libraries():
    a, b = sets()
    for library in ("cleanfid", "cleanfid_from_feats", "pytorch_fid", "torch_fidelity", "torchmetrics", "float64_reference"):  # fmt: skip
        assert fid(a, b) == exactly(RANDOM[f"fid_{library}"])
        assert fid(*tiny()) == exactly(TINY[f"fid_{library}"])
    assert fid(a, b) == exactly(1.561927168594)
    assert fid(b, a) == exactly(fid(a, b))


def test_kid_equals_the_libraries():
    a, b = sets()
    gold, small = RANDOM["kid_full_equal_n"], TINY["kid_full_equal_n"]
    for library in ("unbiased_mmd2", "torchmetrics_poly_mmd", "torch_fidelity"):
        assert kid(a[:250], b) == exactly(gold[library])
        assert kid(*tiny()) == exactly(small[library])
    assert kid(a[:250], b) == exactly(0.05680938627)


def test_kid_of_subsets_equals_torch_fidelity():
    for pair, gold in ((sets(), RANDOM["kid_torch_fidelity"]), (tiny(), TINY["kid_torch_fidelity"])):
        told = kid_subsets(*pair, gold["subsets"], gold["subset_size"])
        assert told == exactly((gold["mean"], gold["std"]))
        assert kid_subsets(*pair, gold["subsets"], gold["subset_size"], seed=1) != told


def test_a_set_against_itself():
    a, _ = sets()
    assert fid(a, a) == pytest.approx(GOLD["identical"]["fid"], abs=1e-12)
    assert kid(a, a) == exactly(GOLD["identical"]["kid_full"])
    assert kid(a, a) < 0


def test_fid_falls_with_the_number_of_pictures_and_kid_does_not():
    for n, gold in GOLD["bias_same_distribution_128d"].items():
        a, b = (np.random.RandomState(seed).randn(int(n), 128) for seed in (10, 11))
        assert fid(a, b) == exactly(gold["fid"])
        assert kid(a, b) == exactly(gold["kid"])


# The definitions


def test_fid_of_gaussians_that_commute():
    """Diagonal covariances, made exact: |m|^2 + sum (s - t)^2."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((50, 5))
    white -= white.mean(0)
    white = np.linalg.qr(white)[0] * 49**0.5  # mean 0, covariance 1
    s, t, m = np.array([1.0, 2, 3, 0, 5]), np.array([2.0, 2, 1, 4, 0]), np.arange(5.0)
    assert fid(white * s, white * t + m) == exactly((m**2).sum() + ((s - t) ** 2).sum())


def test_few_pictures_many_pictures_and_float32_are_one_computation():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 12)), 1.5 * rng.standard_normal((200, 12)) + 0.5
    wide = np.linalg.qr(rng.standard_normal((400, 12)))[0].T  # rotated into 400 dimensions nothing changes,
    assert fid(a @ wide, b @ wide) == exactly(
        fid(a, b)
    )  # but that there are fewer pictures than dimensions now
    assert fid(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(fid(a, b), rel=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    a, b = sets()
    whole = kid(a, b), kid_interval(a, b), kid_of_pairs(a[:250], b)
    subsets = kid_subsets(a, b, 5, 40)
    for size in (1, 7, 250):
        monkeypatch.setattr(module, "BLOCK", size)
        if size > 1:
            assert (kid(a, b), kid_interval(a, b), kid_of_pairs(a[:250], b)) == tuple(map(exactly, whole))
            assert kid_subsets(a, b, 5, 40) == exactly(subsets)
        else:
            assert kid(a[:20], b[:30]) == exactly(naive(a[:20], b[:30]))


# What is told beside them


def test_the_interval_is_the_jackknifes():
    a, b = sets()
    a, b = a[:12], b[:9]
    without_a = [naive(np.delete(a, i, 0), b) for i in range(len(a))]
    without_b = [naive(a, np.delete(b, i, 0)) for i in range(len(b))]
    error = (11 * np.var(without_a) + 8 * np.var(without_b)) ** 0.5
    whole = naive(a, b)
    assert kid_interval(a, b) == exactly((whole, whole - 1.96 * error, whole + 1.96 * error))


def test_the_interval_of_pairs_is_the_jackknifes():
    a, b = (x[:9] for x in sets())

    def apart(rows: list[int]) -> float:
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return np.mean([k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in pairs])

    without = [apart([j for j in range(9) if j != i]) for i in range(9)]
    whole, error = apart(list(range(9))), (8 * np.var(without)) ** 0.5
    assert kid_of_pairs(a, b) == exactly((whole, whole - 1.96 * error, whole + 1.96 * error))


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_hold_the_truth_in_95_of_100(paired: bool):
    """Drawn with replacement from 500 pictures: there KID's true value is known, it is that of the whole, the diagonal in."""
    rng = np.random.default_rng(2)
    a = rng.standard_normal((500, 8))
    b = 0.7 * a + 0.3 * rng.standard_normal(a.shape) + 0.3
    truth = k(a, a).mean() + k(b, b).mean() - 2 * k(a, b).mean()
    held, biased = 0, []
    for _ in range(200):
        i, j = rng.integers(500, size=(2, 60))
        _, low, high = kid_of_pairs(a[i], b[i]) if paired else kid_interval(a[i], b[j])
        held += low <= truth <= high
        biased.append(kid(a[i], b[i]))
    assert 0.89 < held / 200 < 0.99
    more = np.mean([k(x, y) for x, y in zip(a, b, strict=True)]) - k(a, b).mean()
    assert np.mean(biased) == pytest.approx(
        truth - 2 * more / 60, abs=0.02
    )  # as kid_of_pairs' docstring says
    assert np.mean(biased) < 0.7 * truth


def test_why_fid_has_no_bootstrap_interval():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 200, 32))
    whole = fid(a, b)
    resampled = [fid(a[rng.integers(200, size=200)], b[rng.integers(200, size=200)]) for _ in range(50)]
    assert min(resampled) > whole


def test_the_floor_is_fid_of_two_halves():
    a, _ = sets()
    assert 0 < fid_floor(a[:299]) < 1.56
    assert fid_floor(a) == fid_floor(a) != fid_floor(a, seed=1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_mean_and_root", lambda x: seen.append(x) or (x.mean(0), x))
        fid_floor(a[:299])
    assert [len(half) for half in seen] == [149, 149]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 298  # no picture is in both
    with pytest.raises(UserError, match="needs 4 pictures, there are 3"):
        fid_floor(a[:3])


# Counts


def test_too_few_pictures_are_refused_and_few_are_warned_of(capsys: pytest.CaptureFixture):
    a, b = sets()
    with pytest.raises(UserError, match="FID needs 2 pictures or more on each side, there are 1 and 250"):
        fid(a[:1], b)
    with pytest.raises(UserError, match="there are 300 and 0"):
        fid(a, b[:0])
    assert capsys.readouterr().err == ""
    fid(a, b)
    assert capsys.readouterr().err.startswith("warning: FID of 300 and 250 pictures is biased")
    assert fid(a, b, quiet=True) == fid(a, b) and capsys.readouterr().err.count("warning") == 1
    assert caution(2000, 2032) is None
    assert "1999 and 2032" in caution(1999, 2032)
    big = np.random.default_rng(0).standard_normal((2000, 4))
    fid(big, big)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda a, b: kid(a[:1], b), "KID needs 2 pictures or more on each side, there are 1 and 250"),
        (lambda a, b: kid_interval(a, b[:2]), "KID needs 3 pictures or more on each side, there are 300 and 2"),
        (lambda a, b: kid_of_pairs(a, b), "as many pictures on both sides, there are 300 and 250"),
        (lambda a, b: kid_subsets(a, b), "KID needs 1000 pictures or more on each side, there are 300 and 250"),
    ],
)  # fmt: skip
def test_too_few_pictures_for_kid_are_refused(call, told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        call(*sets())


# Pictures


@pytest.mark.parametrize("case", ["clean", "clean_512x384"])
def test_the_resize_is_clean_fids(case: str):
    assert same_pixels(clean_resize(picture(case)), case)
    assert torch.equal(clean_resize(Image.fromarray(picture(case))), clean_resize(picture(case)))
    assert clean_resize(picture(case)).numpy().mean() == pytest.approx(GOLD["resize"][case]["mean"], abs=1e-4)


def test_the_resize_does_not_alias():
    gold = GOLD["resize"]
    deviation = clean_resize(picture("clean_512x384"))[0].numpy().std()
    assert deviation == pytest.approx(gold["clean_512x384"]["std_ch0"], abs=1e-4)
    for other in ("legacy_pytorch_512x384", "torch_fidelity_tf1x_512x384"):
        assert gold[other]["std_ch0"] > deviation + 10


def test_the_resize_is_not_the_others():
    """That the golden tells them apart: pytorch-fid's is remade here and equals its own numbers, and they are not ours."""
    for ours, theirs in (("clean", "legacy_pytorch"), ("clean_512x384", "legacy_pytorch_512x384")):
        x = torch.from_numpy(picture(ours)).permute(2, 0, 1)[None].float()
        legacy = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)[0]
        assert same_pixels(legacy, theirs)
        assert not same_pixels(legacy, ours)
        assert not same_pixels(clean_resize(picture(ours)), theirs)
        assert not same_pixels(clean_resize(picture(ours)), theirs.replace("legacy_pytorch", "torch_fidelity_tf1x"))  # fmt: skip


def test_a_picture_that_is_not_rgb_is_made_so():
    grey = Image.fromarray(picture("clean")[..., 0])
    x = clean_resize(grey)
    assert x.shape == (3, 299, 299) and torch.equal(x[0], x[2])
    assert torch.equal(x[0], clean_resize(picture("clean"))[0])


def test_features_are_in_order_whatever_the_batch():
    pictures = [np.full((5, 4, 3), value, np.uint8) for value in (0, 128, 255, 64, 32)]
    for batch in (1, 2, 5, 100):
        found = features(iter(pictures), Means(), batch, quiet=True)
        called = features([lambda x=x: x for x in pictures], Means(), batch, quiet=True)
        assert np.array_equal(called, found)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, 0], (np.array([0, 128, 255, 64, 32]) - 128) / 128, atol=1e-6)


def test_every_broken_file_is_named(tmp_path: Path):
    for i in range(7):
        Image.new("RGB", (9, 7), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(UserError) as told:
        features([partial(read_image, tmp_path / f"{i}.png") for i in range(7)], Means(), 3, quiet=True)
    assert "1.png: " in str(told.value) and "5.png: the file is empty" in str(told.value)
    assert "\n" not in str(told.value)


def test_nothing_to_see_is_refused():
    with pytest.raises(UserError, match="no pictures to take features of"):
        features([], Means(), quiet=True)
    damaged = Means()
    nn.init.constant_(damaged.conv.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        features([picture("clean")], damaged, quiet=True)


# Planted faults


FAULTS = {
    "covariance over n": ("_mean_and_root", "root / (n - 1) ** 0.5", "root / n**0.5", test_fid_equals_the_libraries),
    "rows not centred": ("_mean_and_root", "x[start : start + 8 * d] - mean", "x[start : start + 8 * d]", test_fid_equals_the_libraries),
    "one root only": ("_frechet", "- 2 * cross", "- cross", test_fid_equals_the_libraries),
    "means left out": ("_frechet", "((mean_a - mean_b) ** 2).sum() + ", "", test_fid_equals_the_libraries),
    "the diagonal in": ("_within", "np.fill_diagonal(k, 0)", "pass", test_kid_equals_the_libraries),
    "a kernel of degree 2": ("_kernel", "k * k * k", "k * k", test_kid_equals_the_libraries),
    "a kernel that forgets d": ("_kernel", "/ x.shape[1] + 1", "+ 1", test_kid_equals_the_libraries),
    "biased": ("_mmd", "bb.sum() / (m * (m - 1))", "bb.sum() / (m * m)", test_kid_equals_the_libraries),
    "blocks below the diagonal forgotten": ("_within", "sums[others] += k.T @ subsets[rows]", "pass", test_blocks_change_nothing),
    "a resize that rounds": ("clean_resize", ".clip(0, 255)", ".clip(0, 255).round()", lambda: test_the_resize_is_clean_fids("clean")),
    "a resize that overshoots": ("clean_resize", ".clip(0, 255)", "", lambda: test_the_resize_is_clean_fids("clean")),
    "Lanczos": ("clean_resize", "Resampling.BICUBIC", "Resampling.LANCZOS", lambda: test_the_resize_is_clean_fids("clean")),
    "pytorch-fid's pixels": ("centred", "(x - 128) / 128", "x / 127.5 - 1", test_features_are_in_order_whatever_the_batch),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_line_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch):
    target, old, new, check = FAULTS[fault]
    plant(monkeypatch, module, target, old, new)
    for name in ("fid", "kid", "clean_resize", "features"):
        monkeypatch.setitem(globals(), name, getattr(module, name))
    with pytest.raises(AssertionError):
        check(monkeypatch) if check is test_blocks_change_nothing else check()


# Helpers


class Means(nn.Module):
    """Stands for Inception: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 299, 299)
        return self.conv(x).mean((2, 3))


def sets() -> tuple[np.ndarray, np.ndarray]:
    a = np.random.RandomState(1).randn(300, 16)
    b = np.random.RandomState(2).randn(250, 16) * 1.2 + 0.1 * np.arange(16) / 16
    assert (a.sum(), b.sum()) == exactly((RANDOM["checksum_real_sum"], RANDOM["checksum_fake_sum"]))
    return a, b


def tiny() -> tuple[np.ndarray, np.ndarray]:
    return np.array(TINY["real"]), np.array(TINY["fake"])


def k(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[-1] + 1) ** 3


def naive(a: np.ndarray, b: np.ndarray) -> float:
    def strangers(x: np.ndarray) -> float:
        return np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    return strangers(a) + strangers(b) - 2 * k(a, b).mean()


def picture(case: str) -> np.ndarray:
    """The pictures that fid_kid.json describes, (h,w,3) uint8."""
    if case == "clean":
        return ((np.arange(8 * 6 * 3).reshape(8, 6, 3) * 7) % 256).astype(np.uint8)
    y, x = np.mgrid[:512, :384]
    return np.stack([((y // 3 + x // 3) % 2) * 255, y * 255 // 511, x * 255 // 383], -1).astype(np.uint8)


def same_pixels(x: Tensor, case: str) -> bool:
    gold = GOLD["resize"][case]["px"]
    return all(
        x[:, *map(int, at.split(","))].tolist() == pytest.approx(values, abs=1e-4)
        for at, values in gold.items()
    )
