"""How long a search takes, beside a plain product of the same bytes: 1,000 pictures to the most that fit into memory.

    python -m eval.search_speed [--repeats 5] [--device cpu]

`Catalog.find` of the first 10 in catalogues of random unit vectors, in files as `infer.py index` writes them, which an untimed
round brings into memory. Beside it `torch.mv` of all that is stored for the pictures, as it is stored (float16), with the
query: it reads the same bytes and says nothing of an order. "ratio" is of times on the clock, "CPU" of CPU s, what all threads
of this process worked. Memory is the whole process's peak in three searches, Python and torch included, less the catalogue's
file, which is mapped. "open" and "check" are what `infer.py search` does before: reading items.jsonl, and, if it has not seen
this file before, its hash.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.timing import CPU, Call, forget_peak, machine, measure, median, peak_memory
from unifashion import Parser, UserError, cpu, training
from unifashion.catalog import VERSION, Catalog, write
from unifashion.config import FULL, TINY

KINDS = ("text", "picture", "both")  # of what is looked for


def random_catalog(folder: Path, n: int, shape: tuple[int, int]) -> Catalog:
    """n pictures, with captions, as (q,d) unit vectors."""
    q, d = shape

    def pieces() -> Iterator[np.ndarray]:
        for width in (q, 1):  # pictures, then captions
            for start in range(0, n, 512):
                piece = torch.randn(min(512, n - start), width, d, generator=generator)
                yield F.normalize(piece, dim=-1).half().numpy()

    generator = torch.Generator().manual_seed(n)
    items = ({"path": f"{i // 1000}/{i}.jpg", "sha256": f"{i:064x}", "caption": "a dress"} for i in range(n))
    write(folder, {"catalogue": VERSION}, {"images": [n, q, d], "captions": [n, d]}, pieces(), items)
    return Catalog(folder)


def searches_of(catalog: Catalog, device: torch.device) -> dict[str, Call]:
    """Name -> one search, and after each the plain product of the same bytes."""
    n, q, d = catalog.images.shape
    images, captions = catalog.images, catalog.captions
    text = F.normalize(torch.randn(d), dim=-1).half()
    picture = F.normalize(torch.randn(q, d), dim=-1).half()

    def find(query: Tensor, composed: bool) -> Tensor:
        return torch.tensor([x["score"] for x in catalog.find(query, 10, composed, device)])

    rows, wide = images.view(n * q, d), images.view(n, q * d)
    return {
        "text": lambda: find(text, False),
        "text, product": lambda: torch.mv(rows, text),
        "picture": lambda: find(picture, False),
        "picture, product": lambda: torch.mv(wide, picture.flatten()),
        "both": lambda: find(text, True),
        "both, product": lambda: (torch.mv(captions, text), torch.mv(rows, text))[1],
    }


def most_that_fit(folder: Path, bytes_each: int) -> int:
    """How many pictures take three quarters of the memory, and of the disk, that nobody uses."""
    free = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    room = min(int(free["MemAvailable"]) * 1024, shutil.disk_usage(folder).free)
    return int(0.75 * room / bytes_each / 1000) * 1000


def time_searches(sizes: list[int], shape: tuple[int, int], repeats: int, device: torch.device) -> None:
    """Print a row for each number of pictures and kind of query."""
    print(f"{'pictures':>9}  {'query':<9}{'MB':>8}{'s':>9}{'product, s':>12}{'ratio':>7}{'CPU':>7}{'us/picture':>12}"
          f"{'MB above':>10}{'open, s':>9}{'check, s':>10}")  # fmt: skip
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            catalog = random_catalog(Path(folder), n, shape)
            print(f"{n} pictures drawn in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            start = time.perf_counter()
            Catalog(Path(folder))
            opened = time.perf_counter()
            catalog.verify(quiet=True)
            checked = time.perf_counter()
            steps, size = searches_of(catalog, device), catalog.file.stat().st_size
            forget_peak()
            for kind in KINDS:
                steps[kind]()
            above = (peak_memory(CPU) - size) / 1e6
            rounds = measure(
                steps, repeats if n > 50_000 else 9 * repeats, device, lambda name: nullcontext()
            )
            for kind in KINDS:
                ours, plain = median(rounds[kind]), median(rounds[f"{kind}, product"])
                print(
                    f"{n:>9}  {kind:<9}{size / 1e6:>8.0f}{ours.seconds:>9.4f}{plain.seconds:>12.4f}{ours.seconds / plain.seconds:>7.2f}"
                    f"{ours.cpu_seconds / plain.cpu_seconds:>7.2f}{1e6 * ours.seconds / n:>12.2f}{above:>10.0f}"
                    f"{opened - start:>9.2f}{checked - opened:>10.2f}",
                    flush=True,
                )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="2,000 small pictures: seconds instead of minutes, no meaning"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, must be at least 1")
    device = training.pick_device(args.device)
    cpu.fast_malloc()
    torch.manual_seed(0)
    print(machine(device, torch.float16), flush=True)
    cfg = (TINY if args.tiny else FULL).qformer
    most = most_that_fit(Path(tempfile.gettempdir()), 2 * (cfg.queries + 1) * cfg.embed_dim)
    sizes = [1000, 2000] if args.tiny else [n for n in (1000, 10_000, 100_000) if n < most] + [most]
    time_searches(sizes, (cfg.queries, cfg.embed_dim), args.repeats, device)


if __name__ == "__main__":
    training.run(main)
