"""FID (Heusel et al., 2017) and KID (Binkowski et al., 2018): how far apart two sets of pictures are, as Inception sees them.

    pictures --clean_resize--> (n,3,299,299) --InceptionV3--> features (n,2048) --fid, kid--> a number, 0 for the same pictures

Four choices make numbers comparable or not, and a table that prints them should tell all four:

    resize       clean-fid's "clean": bicubic with antialiasing, in floats, never rounded (Parmar et al., 2022). pytorch-fid's
                 and torch-fidelity's resizes alias: on a chequer of 3 pixels they leave a deviation of 99 where this leaves 88
    pixels       a byte less 128, over 128, as TensorFlow's graph and clean-fid have it; pytorch-fid divides by 127.5
    reference    which pictures, and how many: FID falls with their number (below), so never compare FIDs of different numbers
    repaint      whether what lies outside a mask was pasted back: up to a third of a try-on's FID

KID is unbiased: its expectation is the same for any number of pictures, and it may be negative. Papers print it times 1000.

Intervals. KID's is the jackknife's (`kid_interval`, `kid_of_pairs`). FID has none here: it is biased (two samples of the same
128-dimensional Gaussian are 42 apart at 200 pictures and 4 at 2032), and drawing pictures with replacement adds bias of its
own, since a resample has fewer different pictures: a bootstrap's interval lies wholly above the figure it stands beside
(tests/test_fid.py). Read FID beside `fid_floor`, what two halves of the reference are apart, and beside KID.
"""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.metrics.inception import InceptionV3
from unifashion import UserError

SIDE = 299
FEW = 2000  # pictures, below which FID says more about their number than about them
BLOCK = 2048  # rows of features at a time: 32 MB of kernel values
Array = np.ndarray


# Pictures to features


def clean_resize(image: Image.Image | Array) -> Tensor:
    """A picture, or (h,w,3) uint8 -> (3,299,299) float32 of 0..255, not rounded: each channel by itself, as clean-fid does."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image, "RGB")
    channels = [
        channel.convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in image.split()
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))  # bicubic overshoots at edges


def centred(x: Tensor) -> Tensor:
    """(b,3,299,299) of 0..255 -> of -1..127/128, as TensorFlow's graph has it."""
    return (x - 128) / 128


def features(
    pictures: Iterable[Image.Image | Array | Callable[[], Image.Image]],
    network: InceptionV3,
    batch: int = 32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> Array:
    """
    (n,2048) float32, in the pictures' order. They are taken as they are needed: a generator is never held as a whole. What is
    no picture is called, and gives one: several are then opened at a time, in threads.

    Raises UserError if there is no picture, if any cannot be opened, or if a feature is not finite.
    """
    return _features(
        pictures, lambda x: clean_resize(x() if callable(x) else x), network, batch, device, quiet
    )


@torch.inference_mode()
def _features(
    items: Iterable,
    prepare: Callable,
    network: InceptionV3,
    batch: int,
    device: str | torch.device,
    quiet: bool,
) -> Array:
    """Threads prepare the next batch while the network sees this one; what it found stays on the device to the end."""
    network = network.to(device, memory_format=torch.channels_last).eval()  # a third faster on a CPU
    dtype = next(network.parameters()).dtype
    rest, found, broken = iter(items), [], []
    total = len(items) if hasattr(items, "__len__") else None
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=total, desc="features", unit="picture", disable=quiet) as bar,
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # 10 bits of mantissa move FID's digits
    ):

        def take() -> list:
            return [pool.submit(prepare, item) for item in islice(rest, batch)]

        coming = take()
        while coming:
            now, coming, ready = coming, take(), []
            for future in now:
                try:
                    ready.append(future.result())
                except UserError as error:
                    broken.append(str(error))
            bar.update(len(now))
            if not broken:  # else only what else is broken is of interest
                found.append(network(centred(torch.stack(ready).to(device, dtype))))
    if broken:
        raise UserError("; ".join(broken))
    if not found:
        raise UserError("there are no pictures to take features of")
    whole = torch.cat(found).float().cpu().numpy()
    if not np.isfinite(whole).all():
        raise UserError("Inception's features are not finite: its file of weights is damaged")
    return whole


# FID


def fid(a: Array, b: Array, quiet: bool = False) -> float:
    """
    Features (n,d) and (m,d) -> |mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2), in float64, of the Gaussians fitted to
    them. Numbers of pictures may differ, and may be smaller than d.

    Raises UserError if there are fewer than 2 of either; fewer than `FEW` are warned of on stderr, unless `quiet`.
    """
    if (warning := caution(len(a), len(b))) and not quiet:
        print(f"warning: {warning}", file=sys.stderr)
    return _frechet(*_mean_and_root(a), *_mean_and_root(b))


def fid_floor(reference: Array, seed: int = 0) -> float:
    """
    FID between two halves (n/2,d) of the reference, drawn at random: about what even real pictures cannot go below.

    Each half has half the pictures, so that it is about twice the bias of the whole: a ceiling for good, no bound.
    """
    order = np.random.default_rng(seed).permutation(len(reference))
    half = len(order) // 2
    if half < 2:
        raise UserError(f"FID of two halves needs 4 pictures, there are {len(order)}")
    return _frechet(
        *_mean_and_root(reference[order[:half]]), *_mean_and_root(reference[order[half : 2 * half]])
    )


def caution(n: int, m: int) -> str | None:
    """What is to be said beside a FID of n and m pictures, if anything. Raises UserError if it has no meaning at all."""
    if min(n, m) < 2:
        raise UserError(f"FID needs 2 pictures or more on each side, there are {n} and {m}")
    if min(n, m) < FEW:
        return f"FID of {n} and {m} pictures is biased upwards: compare it only with others of as many"
    return None


def _frechet(mean_a: Array, root_a: Array, mean_b: Array, root_b: Array) -> float:
    """
    Means (d,) and any R (k,d) with R^T R = C.

    Tr (C_a C_b)^1/2 is the sum of the singular values of R_a R_b^T, whose squares are the eigenvalues of C_a C_b. Taken so it
    needs no root of a matrix that is not symmetric, loses no digits where C has no full rank, and is small where k is.
    """
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross)


def _mean_and_root(x: Array) -> tuple[Array, Array]:
    """(n,d) -> mean (d,), R (min(n,d),d) with R^T R = covariance: the centred rows themselves, or their triangle."""
    (n, d), mean = x.shape, x.mean(0, dtype=np.float64)
    root = np.zeros((0, d))
    for start in range(0, n, 8 * d):
        root = np.concatenate([root, x[start : start + 8 * d] - mean])
        if len(root) > d:
            root = np.linalg.qr(root, mode="r")
    return mean, root / (n - 1) ** 0.5


# KID


def kid(a: Array, b: Array, quiet: bool = False) -> float:
    """
    Features (n,d) and (m,d) -> unbiased MMD^2 with the kernel (x.y/d + 1)^3, of all pictures: no chance is in it.

    A set against itself gives less than 0. Raises UserError if there are fewer than 2 of either.
    """
    _refuse_fewer(2, a, b)
    return float(_mmd(*_sums(a, b, quiet)[:3]))


def kid_interval(a: Array, b: Array, quiet: bool = False) -> tuple[float, float, float]:
    """
    `kid` and the ends of its 95 % interval, by the jackknife: how far it spreads if each picture in turn is left out, which
    the sums over the kernel's rows tell without computing it anew. It is wider than need be where the sets hardly differ.

    For sets that have nothing to do with each other (else `kid_of_pairs`). Raises UserError if there are fewer than 3 of either.
    """
    _refuse_fewer(3, a, b)
    aa, bb, ab, ba = _sums(a, b, quiet)
    n, m = len(a), len(b)
    # KID without picture i of a is, but for what all i share, 2 (ab_i / m - aa_i / (n - 2)) / (n - 1).
    spread = np.var(ab / m - aa / (n - 2)) / (n - 1) + np.var(ba / n - bb / (m - 2)) / (m - 1)
    return _interval(_mmd(aa, bb, ab), 2 * spread**0.5)


def kid_of_pairs(a: Array, b: Array, quiet: bool = False) -> tuple[float, float, float]:
    """
    KID and its 95 % interval where a[i] and b[i], both (n,d), show the same person: made and real, as a try-on's are.

    They are then alike for another reason than the one that is asked for, and `kid`, as every library computes it, is too low
    by 2/n of how much more alike pairs are than strangers. Here no picture meets its own pair, and the jackknife leaves out
    pairs. Raises UserError if there are fewer than 3, or not as many of both.
    """
    _refuse_fewer(3, a, b)
    n = len(a)
    if n != len(b):
        raise UserError(f"KID of pairs needs as many pictures on both sides, there are {n} and {len(b)}")
    aa, bb, ab, ba = _sums(a, b, quiet)
    own = np.array([_kernel(x[None], y[None]).item() for x, y in zip(a, b, strict=True)])
    met = aa + bb - (ab - own) - (ba - own)
    return _interval(met.sum() / (n * (n - 1)), 2 * (np.var(met / (n - 2)) / (n - 1)) ** 0.5)


def kid_subsets(
    a: Array, b: Array, subsets: int = 100, size: int = 1000, seed: int = 2020, quiet: bool = False
) -> tuple[float, float]:
    """
    Mean and standard deviation of `kid` over random subsets, with torch-fidelity's draws: what is usually printed.

    The deviation is that of one subset of `size`, not of the mean: no interval of it. Raises UserError if there are fewer
    pictures than `size`, or if `size` is under 2.
    """
    _refuse_fewer(max(size, 2), a, b)
    rng, in_a, in_b = np.random.RandomState(seed), np.zeros((len(a), subsets)), np.zeros((len(b), subsets))
    for s in range(subsets):
        in_a[rng.choice(len(a), size, replace=False), s] = 1
        in_b[rng.choice(len(b), size, replace=False), s] = 1
    aa, bb, (ab, _) = _within(a, in_a, quiet), _within(b, in_b, quiet), _across(a, b, in_a, in_b, quiet)
    within = ((in_a * aa).sum(0) + (in_b * bb).sum(0)) / (size * (size - 1))
    found = within - 2 * (in_a * ab).sum(0) / size**2
    return float(found.mean()), float(found.std())


def _refuse_fewer(least: int, a: Array, b: Array) -> None:
    if min(len(a), len(b)) < least:
        raise UserError(f"KID needs {least} pictures or more on each side, there are {len(a)} and {len(b)}")


def _interval(whole: float, error: float) -> tuple[float, float, float]:
    return float(whole), float(whole - 1.96 * error), float(whole + 1.96 * error)


def _mmd(aa: Array, bb: Array, ab: Array) -> float:
    n, m = len(aa), len(bb)
    return aa.sum() / (n * (n - 1)) + bb.sum() / (m * (m - 1)) - 2 * ab.sum() / (n * m)


def _sums(a: Array, b: Array, quiet: bool) -> tuple[Array, Array, Array, Array]:
    """The kernel of each a with all other a (n,), of each b with all other b (m,), of each a with all b (n,), and (m,)."""
    all_a, all_b = np.ones((len(a), 1)), np.ones((len(b), 1))
    ab, ba = _across(a, b, all_a, all_b, quiet)
    return _within(a, all_a, quiet)[:, 0], _within(b, all_b, quiet)[:, 0], ab[:, 0], ba[:, 0]


def _within(x: Array, subsets: Array, quiet: bool) -> Array:
    """x (n,d), subsets (n,s) of 0 and 1 -> (n,s) the kernel of each with all but itself that are in the subset, summed."""
    sums = np.zeros(subsets.shape)
    for i in tqdm(range(0, len(x), BLOCK), "KID", disable=quiet, delay=2, leave=False):
        rows = slice(i, i + BLOCK)
        for j in range(i, len(x), BLOCK):
            others = slice(j, j + BLOCK)
            k = _kernel(x[rows], x[others])
            if i == j:
                np.fill_diagonal(k, 0)
            else:
                sums[others] += k.T @ subsets[rows]
            sums[rows] += k @ subsets[others]
    return sums


def _across(a: Array, b: Array, in_a: Array, in_b: Array, quiet: bool) -> tuple[Array, Array]:
    """-> (n,s) the kernel of each a with all b that are in the subset, summed, and (m,s) of each b with such a."""
    ab, ba = np.zeros(in_a.shape), np.zeros(in_b.shape)
    for i in tqdm(range(0, len(a), BLOCK), "KID", disable=quiet, delay=2, leave=False):
        rows = slice(i, i + BLOCK)
        for j in range(0, len(b), BLOCK):
            others = slice(j, j + BLOCK)
            k = _kernel(a[rows], b[others])
            ab[rows] += k @ in_b[others]
            ba[others] += k.T @ in_a[rows]
    return ab, ba


def _kernel(x: Array, y: Array) -> Array:
    k = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return k * k * k  # ** 3 takes ten times as long
