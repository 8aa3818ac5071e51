"""Train the stand-ins for what FULL downloads, all on ToyFashion: the VAE, the ViT, the LLM, and both tokenizers.

    python -m weights.tiny.pretrain vocab|words|vae|vit|llama --data data/toy    writes over its file in weights/tiny/
    python -m weights.tiny.pretrain ship --init runs/phase2     the best of a run -> weights/tiny/model.safetensors, losses.png
    python -m weights.tiny.pretrain record --data data/toy      says in a file without a record that this alone was trained on

model.safetensors knows which ViT, VAE, LLM and vocabularies it was trained with, and is not loaded beside others: it then has to be
trained anew. --out, runs/PART if not given, holds checkpoints and curves. It also knows what it was trained on (`unifashion.seen`): training
writes that, `ship` keeps it, and `record` puts it into the shipped file, whose training did not, leaving every weight as it is; also on what its
length was chosen (`CHOSEN_ON`).

The VAE learns to give pictures back: |x - x'| + 5 (x - x')^2 + half of |grad x - grad x'|, all means, + 2e-7 KL, a sum per
picture. The ViT, which stands in for EVA-CLIP, learns to name a garment's attributes from its photograph (several views) and
its shape from its sketch; its heads are thrown away. Only the training split is read.

The LLM, which stands in for Vicuna, reads text alone: captions of all three styles, each after its instruction, of garments
whose combinations of attributes are training's. Where a picture will be stand the garment's attributes in words, some or
all: as Vicuna does, it can tell what it is told. `words` makes its tokenizer of the same texts.
"""

import argparse
import io
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from unifashion import Parser, UserError, cpu, feed, runs, seen, sheets, training
from unifashion.config import TINY
from unifashion.data import open_image, read_json, toy
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQ
from unifashion.data.mgd import MGD
from unifashion.data.texts import WRITERS
from unifashion.llama import Llama
from unifashion.preprocess import qformer_image, unet_image
from unifashion.tokenizers import INSTRUCTIONS, SentencePiece, blip_caption, build_vocab
from unifashion.vae import VAE, kl_divergence
from unifashion.vit import ViT
from weights.load import check_finished, frozen_hashes

HERE = Path(__file__).parent
# By figures of drawing on its first 500 persons it was decided that try-on should be trained for longer (commit ae932c4).
CHOSEN_ON = "toy test of seed 0"
DEFAULTS = {
    "vae": {"steps": 5000, "batch": 16, "lr": 1e-3},
    "vit": {"steps": 2000, "batch": 32, "lr": 1e-3},
    "llama": {"steps": 3000, "batch": 32, "lr": 2e-3},
}
FOLDERS = {
    "image": "jpg",
    "agnostic-v3.2": "jpg",
    "image-densepose": "jpg",
    "cloth": "jpg",
    "cloth-sketch": "png",
}
HIDDEN_IN_SKETCH = ("colour", "second", "pattern")


class Pictures(Dataset):
    """Everything the VAE will ever see, as (3,y,x) in [-1,1]; `crop` cuts a part of that size out, as LDM's training did."""

    def __init__(self, root: Path, crop: tuple[int, int] = TINY.picture) -> None:
        self.crop = crop
        self.paths = sorted(
            p for f, e in FOLDERS.items() for p in (root / "vitonhd" / "train" / f).glob(f"*.{e}")
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = unet_image(open_image(self.paths[i]), TINY.picture)
        corner = torch.rand(2, generator=training.seeded("crop", i))
        top, left = (
            int(r * (size - cut + 1)) for r, size, cut in zip(corner, x.shape[1:], self.crop, strict=True)
        )
        return {"x": x[:, top : top + self.crop[0], left : left + self.crop[1]]}


class Attributes(Dataset):
    """A garment's three product views and its sketch, with the index of each attribute's value, or -100 if unseen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = toy.read_rows(root, "train")

    def __len__(self) -> int:
        return 4 * len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row, view = self.rows[i // 4], i % 4
        path = self.root / "fashion200k" / row["product"] / f"{Path(row['product']).name}_{view}.jpeg"
        if view == 3:
            path = self.root / "vitonhd" / "train" / "cloth-sketch" / f"{row['id']}.png"
        labels = {k: toy.ATTRIBUTES[k].index(row["garment"][k]) for k in toy.ATTRIBUTES}
        for k in HIDDEN_IN_SKETCH if view == 3 else ():
            labels[k] = -100
        if row["garment"]["pattern"] == "plain":
            labels["second"] = -100
        picture = qformer_image(open_image(path), TINY.vit.image_size[0])
        return {"picture": picture} | {k: torch.tensor(v) for k, v in labels.items()}


def chat(i: int) -> str:
    """Text i: notes on a garment whose attributes training may combine, an instruction, and its answer, a caption."""
    rng = np.random.default_rng([0, i])
    g, style = toy.sample_garment(rng, "train"), list(INSTRUCTIONS)[i % len(INSTRUCTIONS)]
    facts = [
        f"{name} {value}" for name, value in asdict(g).items() if name != "second" or g.pattern != "plain"
    ]
    notes = ", ".join(
        facts[k] for k in rng.permutation(len(facts))[: rng.integers(len(facts) // 2, len(facts) + 1)]
    )
    return f"USER: <Img>{notes}</Img>{INSTRUCTIONS[style]} Assistant: {WRITERS[style](g, rng)}"


class Texts(Dataset):
    """As many texts as are asked for: after (t,), ids with <s> and </s>, and which of them are to be predicted."""

    def __init__(self, words: SentencePiece, n: int) -> None:
        self.words, self.n = words, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        text = [*self.words.encode(chat(i)), self.words.eos][: TINY.max_caption + 64]
        ids = torch.full((TINY.max_caption + 64,), self.words.eos)
        ids[: len(text)] = torch.tensor(text)
        return {"after": ids, "answer": (torch.arange(len(ids)) < len(text)) & (torch.arange(len(ids)) > 0)}


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llama = Llama(TINY.llama)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        ids, known = batch["after"], batch["answer"][:, 1:]
        logits = self.llama.logits(self.llama(self.llama.embed(ids[:, :-1])))
        return {"words": F.cross_entropy(logits[known], ids[:, 1:][known])}


class Namer(nn.Module):
    """The ViT with a linear head for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViT(TINY.vit)
        self.heads = nn.ModuleDict({k: nn.Linear(TINY.vit.dim, len(v)) for k, v in toy.ATTRIBUTES.items()})

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        features = self.vit(batch["picture"]).mean(1)
        total = sum(
            F.cross_entropy(head(features), batch[k], ignore_index=-100) for k, head in self.heads.items()
        )
        return {"names": total}


class Copier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE(TINY.vae)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        x = batch["x"]
        mean, logvar = self.vae.moments(x)
        noise = torch.randn(mean.shape, generator=training.seeded("vae", step))
        z = mean + torch.exp(0.5 * logvar) * noise
        y = self.vae.decode(z * self.vae.cfg.scale)
        pixels = (y - x).abs().mean() + 5 * (
            y - x
        ).square().mean()  # the square: a wrong colour is worse than a blur
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (
            y.diff(dim=-2) - x.diff(dim=-2)
        ).abs().mean()
        kl = kl_divergence(mean, logvar).mean() * 2e-7
        return {"pixels": pixels, "edges": edges / 2, "KL": kl}


def train(
    part: str, root: Path, out: Path, steps: int, batch: int, lr: float, args: argparse.Namespace
) -> None:
    torch.manual_seed(0)
    model: nn.Module = {"vae": Copier, "vit": Namer, "llama": Writer}[part]()
    samples: Dataset
    if part == "llama":
        samples = Texts(SentencePiece(HERE / "llama_tokenizer.model"), steps * batch)
    else:
        samples = Pictures(root, crop=(64, 48)) if part == "vae" else Attributes(root)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    runs.check_out(out, args.resume)
    runs.start_run(out, {"part": part, "steps": steps, "batch": batch, "lr": lr}, args.resume)
    modules = sorted({name.split(".")[0] for name in parameters})
    state, stop = {"step": 0}, training.Stop()
    stop.install()
    if args.resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, None)
    order = feed.batch_order(len(samples), batch, 0, state["step"], steps)
    stream = feed.batches(samples, order, lambda b: b, workers=args.workers)
    bar = tqdm(stream, initial=state["step"], total=steps, desc=part, mininterval=5)
    for step, data in enumerate(bar, start=state["step"]):
        for group in optimizer.param_groups:
            group["lr"] = lr * training.cosine(step, steps, warmup=min(100, steps))
        with training.autocast(torch.device("cpu"), args.dtype):
            losses = model.loss(data, step)
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step + 1
        done = state["step"] == steps or stop.asked
        saves = state["step"] % args.eval_every == 0 or done
        if step % 20 == 0 or saves:  # what is saved has been looked at
            shown = {k: round(float(v.detach()), 4) for k, v in losses.items()}
            bar.set_postfix(shown)
            found = {**shown, "the gradient's norm": float(norm)}
            if bad := [f"{k} is {v}" for k, v in found.items() if not math.isfinite(v)]:
                raise UserError(f"{bad[0]} at step {step}: the run diverged")
            runs.log_line(out, step=step, **shown)
        if saves:
            runs.save_checkpoint(out / "last", model, modules, optimizer, parameters, None, state)
            sheets.draw_curves([out], out / "losses.png")
        if done:
            break
    if stop.asked:
        print(f"pretrain.py: stopped, {out} is saved: --resume goes on", file=sys.stderr)
        return
    save_half(getattr(model, part).state_dict(), HERE / f"{part}.safetensors")
    if part == "vae":
        report_vae(model.vae.eval(), Pictures(root), out)


def save_half(tensors: dict[str, Tensor], path: Path, beside: dict[str, str] | None = None) -> None:
    """Shipped weights are float16: half the download, and no picture shows it. `beside`: the files that they belong to."""
    new = path.with_suffix(".new")
    save_file(
        {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}, new, beside
    )
    new.replace(path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


@torch.no_grad()
def report_vae(vae: VAE, samples: Dataset, out: Path) -> None:
    indices = torch.randperm(len(samples), generator=training.seeded("report"))[:256].tolist()
    x = torch.stack([samples[i]["x"] for i in indices])
    z = vae.encode(x) / vae.cfg.scale
    y = vae.decode(z * vae.cfg.scale).clamp(-1, 1)
    psnr = -10 * torch.log10(((x - y) / 2).square().flatten(1).mean(1)).mean()
    print(
        f"PSNR {psnr:.2f} dB; standard deviation of the latents {z.std():.4f}: the preset's scale is {1 / z.std():.5f}"
    )
    sheets.save_sheet([x[:10], y[:10]], out / "samples" / "copies.png")


def write_vocab(root: Path) -> None:
    """Every word of the training texts that the Q-Former reads: captions of three styles, MGD's, and modifications."""
    mgd = MGD(root / "vitonhd", "train")
    texts = {text for _, text in Fashion200K(root / "fashion200k", "train").rows}
    texts |= {", ".join(mgd.captions[cloth[:5]]) for _, cloth in mgd.photos.pairs}
    texts |= set(FashionGen(root / "fashiongen", "train").texts)
    triplets = FashionIQ(root / "fashioniq", "train")
    texts |= set(triplets.captions.values()) | {text for row in triplets.rows for text in row.captions}
    vocab = build_vocab(sorted(map(blip_caption, texts)))
    path = HERE / "bert_vocab.txt"
    path.write_text("\n".join(vocab) + "\n")
    print(f"wrote {path}: {len(vocab)} pieces; the preset's vocab_size is {TINY.qformer.vocab_size}")


def write_words() -> None:
    """Llama's kind of tokenizer: BPE with byte fallback, nothing normalised; ids of <unk>, <s>, </s> 0, 1, 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(chat, range(30_000)),
        model_writer=model,
        vocab_size=TINY.llama.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=1,
        num_threads=1,  # the same file every time
    )
    path = HERE / "llama_tokenizer.model"
    new = path.with_suffix(".new")
    new.write_bytes(model.getvalue())
    new.replace(path)
    lengths = [len(SentencePiece(path).encode(chat(i))) for i in range(300)]
    print(f"wrote {path}: {len(SentencePiece(path))} pieces; a text has {max(lengths)} tokens at most")


def add_record(path: Path, root: Path) -> None:
    """
    Into the shipped file the record that all it was trained on is the ToyFashion at `root`; weights and metadata stay.

    Raises UserError for a file that has a record: its training wrote that, and knows better.
    """
    with safe_open(path, "pt") as file:
        beside = file.metadata()
    weights, before = seen.apart(load_file(path), path)
    if before:
        raise UserError(f"{path} says already what it was trained on: {seen.read_record(path).told()}")
    new = path.with_suffix(".new")
    chosen = {f"{seen.CHOSEN}{CHOSEN_ON}": seen.nothing()}
    save_file(weights | seen.record([MGD(root / "vitonhd", "train")]) | chosen, new, beside)
    new.replace(path)
    print(f"{path} was trained on {seen.read_record(path).told()}")


def _read_config(run: Path) -> dict:
    return read_json(run / "config.json")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("part", choices=["vocab", "words", "vae", "vit", "llama", "ship", "record"])
    parser.add_argument("--data", type=Path, default=Path("data/toy"))
    parser.add_argument(
        "--out",
        type=Path,
        help="run folder, for checkpoints (default runs/PART); the result goes to weights/tiny",
    )
    parser.add_argument(
        "--init", type=Path, default=Path("runs/phase2"), help="the run to ship (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    args = parser.parse_args(argv)
    cpu.fast_malloc()
    if args.part == "ship":
        best = args.init / "best" / "model.safetensors"
        if not best.is_file():
            raise UserError(
                f"{best} is missing: --init wants the folder of the last run, after an evaluation"
            )
        beside = frozen_hashes("tiny", HERE)
        config = _read_config(args.init)
        if (done := read_json(args.init / "last/state.json")["step"]) < config["steps"]:
            raise UserError(f"{args.init} was stopped at step {done} of {config['steps']}: --resume goes on")
        for name, digest in beside.items():
            if config["company"].get(name) != digest:
                raise UserError(f"{args.init} was trained with another {name} than {HERE / name}")
        learned = load_file(best)
        check_finished(best, learned, "tiny", writes=True)
        stages = [args.init]  # and what it started from, and what that started from, as far as they are here
        while before := _read_config(stages[0])["init"]:
            before = Path(before).parent if Path(before).name in ("best", "last") else Path(before)
            if not (before / "config.json").is_file():
                print(
                    f"losses.png is without the curves of {before}, which is no run folder", file=sys.stderr
                )
                break
            stages.insert(0, before)
        frozen = [run for run in map(args.init.with_name, ("vae", "vit", "llama")) if run.is_dir()]
        sheets.draw_curves([*frozen, *stages], HERE / "losses.png")
        return save_half(learned, HERE / "model.safetensors", beside)
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}, must be 0 or more")
    for flag in ("steps", "batch_size", "eval_every"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}, must be positive")
    root = training.toy_folder(args.data)
    if args.part == "record":
        return add_record(HERE / "model.safetensors", root)
    if args.part == "vocab":
        return write_vocab(root)
    if args.part == "words":
        return write_words()
    d = DEFAULTS[args.part]
    out = args.out or Path("runs") / args.part
    train(args.part, root, out, args.steps or d["steps"], args.batch_size or d["batch"], d["lr"], args)


if __name__ == "__main__":
    training.run(main)
