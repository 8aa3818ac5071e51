"""Phase 1, cross-modal pre-training (Sec. 3.1): image-text pairs teach the Q-Former, then its readers, one after the other.

align      ITC + ITM                  Eq. 3-5   the Q-Former learns to compare pictures and texts
caption    ITG                        Eq. 6     the text adapter and LoRA learn to write a picture's text from Z_I
generate   q2I                        Eq. 7     the adapters and the U-Net learn to draw a picture from Z_I

    python train_phase1.py --data fashion200k --stage align --out runs/align

The defaults are the paper's, of the full size; README has the flags that the tiny preset was trained with.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

from unifashion import Parser, UserError, diffusion, losses, runs, training
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.data.readers import READERS, in_toy
from unifashion.model import UniFashion, start_adapter
from unifashion.preprocess import qformer_image
from unifashion.tokenizers import SentencePiece, WordPiece, answer_ids, blip_caption, prompt
from unifashion.tryon import unet_picture
from weights.load import PUBLIC_PARTS, check_public, company, llm_tokenizer, load_public, tokenizer

TRAINABLE = {  # everything else is frozen; a test holds every parameter to this
    "align": ["qformer.*"],  # with ln_vision, query tokens, projections, ITM head, temperature
    # Sec. 3.1.2: the Q-Former is frozen
    "caption": ["text_adapter.*", "llama.*.lora_a", "llama.*.lora_b"],
    "generate": ["image_adapter.*", "style_adapter.*", "null_context", "unet.*"],
}
DEFAULTS = {  # align: the official code's; caption, generate: the paper's appendix B, caption's epochs the code's
    "align": {
        "batch_size": 128,
        "lr": 2e-5,
        "epochs": 10,
        "steps": None,
        "weight_decay": 0.05,
        "betas": (0.9, 0.98),
        "warmup": 0.05,
    },
    "caption": {
        "batch_size": 32,
        "lr": 2e-5,
        "epochs": 2,
        "steps": None,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "warmup": 0.03,
    },
    "generate": {
        "batch_size": 32,
        "lr": 1e-4,
        "epochs": None,
        "steps": 360_000,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "warmup": None,  # a fixed rate
    },
}


class Pairs(Dataset):
    """Pictures and their texts as tensors, for `align` and `generate`. `product` tells which pairs belong together."""

    def __init__(self, data: dict[str, Dataset], cfg: UniFashionConfig, words: WordPiece) -> None:
        self.data, self.cfg, self.words = ConcatDataset(data.values()), cfg, words

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        ids, mask = self.words.encode([blip_caption(item["text"])], self.cfg.qformer.max_text)
        return {
            "picture": qformer_image(item["image"], self.cfg.vit.image_size[0]),
            "x0": unet_picture(item["image"], self.cfg),
            "ids": ids[0],
            "mask": mask[0],
            "product": torch.tensor(zlib.crc32(item["product"].encode())),
        }


class Answers(Dataset):
    """Pictures, and their texts as answers to the instruction of their style: the name of the data set they are from."""

    def __init__(self, data: dict[str, Dataset], cfg: UniFashionConfig, words: SentencePiece) -> None:
        self.data, self.cfg, self.words = ConcatDataset(data.values()), cfg, words
        self.style = [style for style, part in data.items() for _ in range(len(part))]
        self.before = torch.tensor(prompt(words, next(iter(data)))[0])
        self.after = {style: prompt(words, style)[1] for style in data}
        self.room = max(map(len, self.after.values())) + cfg.max_caption

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item, after = self.data[i], self.after[self.style[i]]
        answer = answer_ids(self.words, item["text"], self.cfg.max_caption)
        ids = torch.full((self.room,), self.words.eos)
        ids[: len(after) + len(answer)] = torch.tensor(after + answer)
        column = torch.arange(self.room)
        return {
            "picture": qformer_image(item["image"], self.cfg.vit.image_size[0]),
            "before": self.before,  # of every sample the same
            "ids": ids,  # right of the soft prompt: the rest of the template, the answer and its end, padding
            "answer": (column >= len(after)) & (column < len(after) + len(answer)),
        }


@torch.no_grad()
def encode_align(model: UniFashion, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": model.vit(batch["picture"]), **{k: batch[k] for k in ("ids", "mask", "product")}}


@torch.no_grad()
def encode_caption(model: UniFashion, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """-> Z_I (b,32,768), and of its template and answer the token ids before (b,p) and after it (b,t)."""
    z, _ = model.qformer(model.see(batch["picture"]))
    return {"z": z, **{k: batch[k] for k in ("before", "ids", "answer")}}


@torch.no_grad()
def encode_generate(model: UniFashion, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    z, _ = model.qformer(model.see(batch["picture"]))
    mean, logvar = model.vae.moments(batch["x0"])
    return {"z": z, "mean": mean, "logvar": logvar}


def align_losses(
    model: UniFashion, batch: dict[str, Tensor], seed: int, step: int, progress: float
) -> dict[str, Tensor]:
    """Eq. 5. The negatives of ITM are even draws at first and hard from half of the run on: a curriculum."""
    qformer = model.qformer
    with torch.no_grad():
        qformer.temp.clamp_(0.001, 0.5)  # as ALBEF and BLIP do; the official code forgot it
    seen = qformer.ln_vision(batch["features"])
    ids, mask, product = batch["ids"], batch["mask"], batch["product"]
    z, _ = qformer(seen)  # Eq. 2: two passes, so that neither sees the other
    _, text = qformer(ids=ids, mask=mask)
    sim = losses.similarity(qformer.embed_image(z), qformer.embed_text(text))

    same = (product[:, None] == product) | (ids[:, None] == ids).all(-1)
    generator, hardness = training.seeded("itm", seed, step), min(1.0, 2 * progress)
    no_text, no_image = losses.hard_negatives(sim * hardness, qformer.temp, same, generator)
    z, _ = qformer(  # one pass over (image, text), (image, wrong text), (wrong image, text)
        torch.cat([seen, seen, seen[no_image]]),
        torch.cat([ids, ids[no_text], ids]),
        torch.cat([mask, mask[no_text], mask]),
    )
    logits = qformer.itm_head(z).mean(1)
    return {"itc": losses.itc(sim, qformer.temp), "itm": losses.itm(logits[: len(ids)], logits[len(ids) :])}


def caption_losses(
    model: UniFashion, batch: dict[str, Tensor], seed: int, step: int, progress: float
) -> dict[str, Tensor]:
    logits = model.predict_words(batch["z"], batch["before"][0], batch["ids"])
    return {"itg": losses.itg(logits, batch["ids"], batch["answer"])}


def generate_losses(
    model: UniFashion, batch: dict[str, Tensor], seed: int, step: int, progress: float
) -> dict[str, Tensor]:
    b, shape = len(batch["z"]), batch["mean"].shape[1:]
    generator = training.seeded("generate", seed, step)
    draw = lambda *size: torch.randn(*size, generator=generator).to(batch["mean"].device)  # noqa: E731
    x0 = model.vae.sample(batch["mean"], batch["logvar"], draw(b, *shape))
    t = torch.randint(0, diffusion.TIMESTEPS, (b,), generator=generator).to(x0.device)
    keep = (torch.rand(b, generator=generator) >= 0.2).to(x0.device)
    noise = draw(b, *shape)
    context = model.drop_context(model.image_adapter(batch["z"]), keep)
    e = model.predict_noise(diffusion.q_sample(x0, t, noise), t, model.blank_scene(b), context)
    return {"q2I": model.q2i(e, noise, t)}


STAGES = {
    "align": (encode_align, align_losses),
    "caption": (encode_caption, caption_losses),
    "generate": (encode_generate, generate_losses),
}
# ToyFashion's weights learned to compare and to draw from short texts; it writes all three styles.
TOY_PARTS = {"align": ["fashion200k"], "caption": list(READERS), "generate": ["fashion200k"]}


def open_data(names: list[str], stage: str) -> dict[str, Dataset]:
    """NAME[=PATH] for each data set -> {name: its training split}. Raises UserError for one that is named twice."""
    parts: dict[str, Dataset] = {}
    for name, path in (training.name_and_path(n, ("toy", *READERS)) for n in names):
        folders = {name: path}
        if name == "toy":
            world = training.toy_folder(path)
            folders = {part: in_toy(world, part) for part in TOY_PARTS[stage]}
        for part, folder in folders.items():
            if part in parts:
                raise UserError(f"--data names {part} twice (toy stands for {', '.join(TOY_PARTS[stage])})")
            parts[part] = READERS[part](folder, "train")
    return parts


def train(stage: str, args: argparse.Namespace, init: Path | None, out: Path, resume: bool) -> bool:
    """-> whether it came to its end: False after Ctrl-C."""
    hparams = {
        k: v if getattr(args, k, None) is None else getattr(args, k) for k, v in DEFAULTS[stage].items()
    }
    encode, loss_of = STAGES[stage]
    device = training.pick_device(args.device)
    training.plain_attention(device, args.dtype)
    runs.check_out(out, resume)
    before = runs.asked_before(out, resume)
    init = init or before.get("init")
    size, accumulate = hparams["batch_size"], args.accumulate
    if stage == "align" and size < 2:
        raise UserError("--batch-size is 1: align finds a picture's wrong texts in its batch, 2 at least")

    writes = stage == "caption"
    words = (llm_tokenizer if writes else tokenizer)(args.preset, args.weights)
    data = open_data(args.data, stage)
    samples = (Answers if writes else Pairs)(data, PRESETS[args.preset], words)
    products = [name for part in data.values() for name in part.products]
    train_set, val_set = (Subset(samples, part) for part in training.held_out(products))
    steps = training.planned_steps(args, hparams, len(train_set), before)

    torch.manual_seed(args.seed)  # what no file holds starts random
    llm_dtype = training.compute_dtype(device, args.dtype)  # what is frozen needs no float32
    model = load_public(
        args.preset, args.weights, device, draws=stage == "generate", writes=writes, llm_dtype=llm_dtype
    )
    if writes:
        model.llama.checkpointing = args.preset == "full"
    fresh = not runs.has_checkpoint(out)  # else the checkpoint holds all of what follows
    modules = runs.load_learned(model, runs.model_file(Path(init))) if fresh and init else []
    if fresh and stage != "align" and "qformer" not in {*modules, *PUBLIC_PARTS[args.preset]}:
        raise UserError(
            f"of preset {args.preset} no file holds a Q-Former: --init wants a run of stage align or later"
        )
    parameters = training.set_trainable(model, TRAINABLE[stage])
    training.train_mode(model, parameters)
    # A temperature that follows a large rate sharpens ITC until ITM's gradient is lost beside it. Soft prompts start as what
    # the LLM can read, and the rate that LoRA needs would stir that: a tenth, as LLaVA gives its projector beside LoRA.
    lr = hparams["lr"]
    slower = {"qformer.temp": min(lr, 2e-5), "text_adapter.weight": lr / 10, "text_adapter.bias": lr / 10}
    groups = [{"params": [p], "peak": slower[name]} for name, p in parameters.items() if name in slower]
    groups = [{"params": [p for name, p in parameters.items() if name not in slower], "peak": lr}, *groups]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=hparams["betas"], weight_decay=hparams["weight_decay"])

    runs.start_run(
        out,
        {
            **vars(args),
            **hparams,
            "stage": stage,
            "steps": steps,
            "init": init,
            "company": company(args.preset, args.weights),
        },
        resume,
    )

    def feed(data: Dataset, order: Iterator[list[int]], cache: bool) -> Iterator[dict[str, Tensor]]:
        to_device = lambda batch: {k: v.to(device) for k, v in batch.items()}  # noqa: E731
        see = lambda batch: encode(model, to_device(batch))  # noqa: E731
        return map(to_device, training.batches(data, order, see, cache, args.workers))

    if fresh:
        for part in sorted(set(map(runs.part_of, parameters))):
            start = "starts as published" if part in PUBLIC_PARTS[args.preset] else "starts anew"
            tqdm.write(f"{part} {f'goes on from {init}' if part in modules else start}", file=sys.stderr)
    if fresh and stage != "align" and TRAINABLE[stage][0].removesuffix(".*") not in modules:
        few = training.batch_order(len(train_set), size, args.seed, 0, 8)
        with training.autocast(device, args.dtype):
            z = torch.cat([batch["z"] for batch in feed(train_set, few, False)])
        if writes:  # soft prompts as large as words, in which small differences, too, are heard
            start_adapter(model.text_adapter, z, float(model.llama.embed.weight.float().std()), floor=1e-4)
        else:
            start_adapter(model.image_adapter, z)
    ema = training.EMA(parameters) if stage == "generate" else None
    state = {"step": 0, "best": float("inf"), "modules": modules}
    if resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, ema)
    modules = sorted({*state["modules"], *map(runs.part_of, parameters)})

    def evaluate() -> float:
        model.eval()
        order = training.batch_order(len(val_set), min(size, len(val_set)), 0, 0, 4)
        with torch.no_grad(), training.autocast(device, args.dtype):
            values = [
                sum(loss_of(model, b, 0, i, 1.0).values()) for i, b in enumerate(feed(val_set, order, False))
            ]
        if stage != "align":
            eight = training.batch_order(len(val_set), min(8, len(val_set)), 0, 0, 1)
            batch, path = next(feed(val_set, eight, False)), out / "samples" / f"{state['step']:06}"
            with training.autocast(device, args.dtype):
                if writes:
                    write_samples(model, batch, words, path.with_suffix(".txt"))
                else:
                    draw_samples(model, batch, path.with_suffix(".png"))
        training.train_mode(model, parameters)
        return float(torch.stack(values).mean())

    order = training.batch_order(
        len(train_set), size, args.seed, state["step"] * accumulate, steps * accumulate
    )
    stream = feed(train_set, order, args.cache)
    stop = training.Stop()
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc=stage, mininterval=1)
    clock, logged = time.perf_counter(), state["step"]
    for step in bar:
        rate = 1.0
        if hparams["warmup"] is not None:
            rate = training.cosine(step, steps, warmup=max(1, int(steps * hparams["warmup"])))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        for micro in range(step * accumulate, (step + 1) * accumulate):
            with training.autocast(device, args.dtype):
                batch = next(stream)
                torch.manual_seed(args.seed + micro)  # dropout, too, depends on the step alone
                parts = loss_of(model, batch, args.seed, micro, step / steps)
            norms = training.backward_apart(parts, list(parameters.values()), 1 / accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()
        state["step"] = step + 1
        done = state["step"] == steps or stop.asked
        if step % 20 == 0 or done:
            shown = {name: round(float(value.detach()), 4) for name, value in parts.items()}
            bar.set_postfix(shown)
            runs.check_finite(out, step, shown)
            seconds = round((time.perf_counter() - clock) / (step + 1 - logged), 3)
            clock, logged = time.perf_counter(), step + 1
            runs.log_line(
                out,
                step=step,
                **shown,
                lr=lr * rate,
                norms=[round(n, 3) for n in norms.tolist()],
                seconds=seconds,
            )
        if state["step"] % args.eval_every == 0 or state["step"] == steps:
            with training.averaged(ema):
                val = evaluate()
            runs.save_evaluated(out, val, model, modules, optimizer, parameters, ema, state)
        elif stop.asked:
            runs.save_checkpoint(out / "last", model, modules, optimizer, parameters, ema, state)
        if stop.asked:
            break
    return state["step"] == steps


@torch.no_grad()
def draw_samples(model: UniFashion, batch: dict[str, Tensor], path: Path) -> None:
    """Rows: the pictures of a batch, and what the model draws from their Z_I."""
    scale, shape = model.cfg.vae.scale, batch["mean"].shape
    noise = torch.randn(shape, generator=training.seeded("samples")).to(batch["mean"])
    context = model.image_adapter(batch["z"])
    *_, latent = model.sample(
        noise, model.blank_scene(len(noise)), context, steps=10, sampler="dpm++", guidance=model.cfg.guidance
    )
    runs.save_sheet([model.vae.decode(batch["mean"] * scale), model.vae.decode(latent)], path)


@torch.no_grad()
def write_samples(model: UniFashion, batch: dict[str, Tensor], words: SentencePiece, path: Path) -> None:
    """For each picture of a batch its text, and below what the model writes after the same instruction."""
    lines = []
    for z, before, ids, answer in zip(*(batch[k] for k in ("z", "before", "ids", "answer")), strict=True):
        start = int(answer.int().argmax())
        room = model.cfg.max_caption
        written = model.write(z[None], before, ids[None, :start], room, words.eos)[0]
        lines += [words.decode(ids[answer].tolist()), "-> " + words.decode(written.tolist()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME[=PATH]", help=" | ".join(["toy", *READERS])
    )
    parser.add_argument(
        "--stage",
        choices=["all", *STAGES],
        default="all",
        help="all: one after the other (default %(default)s)",
    )
    training.common_arguments(parser, DEFAULTS)
    args = parser.parse_args(argv)
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    training.check_arguments(args, stages, "--stage")
    training.fast_malloc()
    init = args.init
    begun = [stage for stage in stages if (args.out / stage / "config.json").is_file()]
    if len(stages) > 1 and args.resume and not begun:
        raise UserError(f"nothing to resume: {args.out} holds no run")
    for stage in (
        stages if len(stages) > 1 else []
    ):  # what a later stage lacks is told before the first has trained
        writes = stage == "caption"
        (llm_tokenizer if writes else tokenizer)(args.preset, args.weights)
        check_public(args.preset, args.weights, stage == "generate", writes)
        open_data(args.data, stage)
    for stage in stages:
        out, resume = args.out, args.resume
        if len(stages) > 1:  # a stage that had not begun when the others were stopped begins now
            out = args.out / stage
            resume = args.resume and stage in begun
        if not train(stage, args, init, out, resume):
            print(f"train_phase1.py: stopped, {out} is saved: --resume goes on", file=sys.stderr)
            sys.exit(130)  # as a shell says it of what Ctrl-C ended
        init = out


if __name__ == "__main__":
    training.run(main)
