"""Phase 2, composed multimodal fine-tuning (Sec. 3.2).

    tryon   q2I of a person in a garment   Eq. 7, 12, Fig. 3   adapters, U-Net and garment encoder learn

Try-on and design are one task: for each sample one condition is drawn, and the Q-Former reads what the garment encoder
reads: the cloth photo, or the sketch, with the text or without. The Q-Former is frozen here.

    python train_phase2.py --data vitonhd mgd --task tryon --init runs/generate --out runs/tryon

The defaults are the paper's, of the full size; README has the flags that the tiny preset was trained with.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

from unifashion import Parser, UserError, diffusion, runs, training
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.data.mgd import MGD
from unifashion.data.vitonhd import VITONHD
from unifashion.model import UniFashion, start_adapter
from unifashion.tokenizers import WordPiece, blip_caption
from unifashion.tryon import garment_tensors, person_tensors, unet_picture
from weights.load import PUBLIC_PARTS, company, load_public, tokenizer

TRAINABLE = {  # everything else is frozen; a test holds every parameter to this
    "tryon": ["image_adapter.*", "style_adapter.*", "null_context", "unet.*", "garment.*"],
}
DEFAULTS = {  # the paper's appendix B
    "tryon": {
        "batch_size": 32,
        "lr": 1e-4,
        "epochs": None,
        "steps": 360_000,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
    },
}
# What the Q-Former and the garment encoder may be given, and how often, where a data set has sketches and texts.
CONDITIONS = {"cloth": 0.3, "cloth+text": 0.1, "sketch+text": 0.5, "sketch": 0.1}
# Left out at random. context: for guidance, as latent diffusion does; pose: infer.py may have none; hint: a garment that
# only the Q-Former read. The paper gives no numbers.
DROP = {"context": 0.2, "pose": 0.1, "hint": 0.1}


class Scenes(Dataset):
    """A person, what is kept of it, and every condition, as tensors."""

    def __init__(self, data: Dataset, cfg: UniFashionConfig, words: WordPiece) -> None:
        self.data, self.cfg, self.words = data, cfg, words

    def __len__(self) -> int:
        return len(self.data)

    def clothes(self) -> list[str]:
        return [cloth for part in self.data.datasets for _, cloth in pairs_of(part)]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        sketched = "sketch" in item
        cloth = garment_tensors(item["cloth"], False, self.cfg)
        sketch = garment_tensors(item["sketch"].convert("RGB"), True, self.cfg) if sketched else cloth
        ids, mask = self.words.encode([blip_caption(item.get("text", ""))], self.cfg.qformer.max_text)
        odds = list(CONDITIONS.values()) if sketched else [1.0, 0.0, 0.0, 0.0]
        return {
            "person": unet_picture(item["person"], self.cfg),
            **person_tensors(item["person"], item["mask"], item["pose"], self.cfg),
            "hints": torch.stack([cloth["hint"], sketch["hint"]]),
            "pictures": torch.stack([cloth["picture"], sketch["picture"]]),
            "ids": ids[0],
            "text_mask": mask[0],
            "odds": torch.tensor(odds),
        }


@torch.no_grad()
def encode_tryon(model: UniFashion, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The frozen half: latents, and Z for each of CONDITIONS, in their order."""
    mean, logvar = model.vae.moments(batch["person"])
    cloth, sketch = (model.see(p) for p in batch["pictures"].unbind(1))
    texts = {"ids": batch["ids"], "mask": batch["text_mask"]}
    z = [
        model.qformer(seen, **t)[0]
        for seen, t in ((cloth, {}), (cloth, texts), (sketch, texts), (sketch, {}))
    ]
    cloth, sketch = (model.vae.encode(h) for h in batch["hints"].unbind(1))
    return {
        "mean": mean,
        "logvar": logvar,
        "agnostic": model.vae.encode(batch["agnostic"]),
        "keep": batch["keep"],
        "pose": model.vae.encode(batch["pose"]),
        "z": torch.stack(z, dim=1),
        "hints": torch.stack([cloth, cloth, sketch, sketch], dim=1),
        "odds": batch["odds"],
    }


def tryon_losses(
    model: UniFashion, batch: dict[str, Tensor], seed: int, step: int, progress: float
) -> dict[str, Tensor]:
    b, shape, device = len(batch["mean"]), batch["mean"].shape[1:], batch["mean"].device
    generator = training.seeded("tryon", seed, step)
    draw = lambda: torch.randn(b, *shape, generator=generator).to(device)  # noqa: E731
    kept = {name: (torch.rand(b, generator=generator) >= p).to(device) for name, p in DROP.items()}
    chosen = torch.multinomial(batch["odds"], 1, generator=generator)[:, 0].to(device)
    row = torch.arange(b, device=device)

    x0 = model.vae.sample(batch["mean"], batch["logvar"], draw())
    t = torch.randint(0, diffusion.TIMESTEPS, (b,), generator=generator).to(device)
    noise = draw()
    scene = model.scene(batch["agnostic"], batch["keep"], batch["pose"] * kept["pose"][:, None, None, None])
    context = model.drop_context(model.image_adapter(batch["z"][row, chosen]), kept["context"])
    x = diffusion.q_sample(x0, t, noise)
    e = model.predict_noise(x, t, scene, context, batch["hints"][row, chosen], kept["hint"].to(x.dtype))
    return {"q2I": model.q2i(e, noise, t)}


TASKS = {"tryon": (encode_tryon, tryon_losses)}


def open_data(names: list[str]) -> Dataset:
    """NAME[=PATH] for each data set -> all of them, one after the other."""
    parts: list[Dataset] = []
    for name, path in (training.name_and_path(n, ("toy", "vitonhd", "mgd")) for n in names):
        if name == "toy":
            path = training.toy_folder(path) / "vitonhd"
        parts.append(VITONHD(path, "train") if name == "vitonhd" else MGD(path, "train"))
    return ConcatDataset(parts)


def pairs_of(part: VITONHD | MGD) -> list[tuple[str, str]]:
    return part.photos.pairs if isinstance(part, MGD) else part.pairs


def train(task: str, args: argparse.Namespace) -> bool:
    """-> whether it came to its end: False after Ctrl-C."""
    hparams = {
        k: v if getattr(args, k, None) is None else getattr(args, k) for k, v in DEFAULTS[task].items()
    }
    encode, loss_of = TASKS[task]
    device, out = training.pick_device(args.device), args.out
    runs.check_out(out, args.resume)
    before = runs.asked_before(out, args.resume)
    init = args.init or before.get("init")

    words = tokenizer(args.preset, args.weights)
    scenes = Scenes(open_data(args.data), PRESETS[args.preset], words)
    train_set, val_set = (Subset(scenes, part) for part in training.held_out(scenes.clothes()))
    size, accumulate = hparams["batch_size"], args.accumulate
    steps = training.planned_steps(args, hparams, len(train_set), before)

    torch.manual_seed(args.seed)  # what no file holds starts random
    model = load_public(args.preset, args.weights, device)
    fresh = not runs.has_checkpoint(out)  # else the checkpoint holds all of what follows
    modules = runs.load_learned(model, runs.model_file(Path(init))) if fresh and init else []
    if fresh and "qformer" not in {*modules, *PUBLIC_PARTS[args.preset]}:
        raise UserError(
            f"of preset {args.preset} no file holds a Q-Former: --init wants a run of stage align or later"
        )
    if model.garment.untrained:  # a run that goes on loads what it had over this
        model.garment.start_from(model.unet.encoder, model.unet.time_embed)
    parameters = training.set_trainable(model, TRAINABLE[task])
    training.train_mode(model, parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=hparams["lr"], betas=hparams["betas"], weight_decay=hparams["weight_decay"]
    )

    runs.start_run(
        out,
        {
            **vars(args),
            **hparams,
            "stage": task,  # the name that phase 1 uses: neither goes on with the other's run
            "steps": steps,
            "init": init,
            "company": company(args.preset, args.weights),
        },
        args.resume,
    )

    def feed(data: Dataset, order: Iterator[list[int]], cache: bool) -> Iterator[dict[str, Tensor]]:
        # The odds stay: what is drawn is drawn on the CPU, and to fetch them would wait for the device.
        to_device = lambda batch: {k: v if k == "odds" else v.to(device) for k, v in batch.items()}  # noqa: E731
        see = lambda batch: encode(model, to_device(batch))  # noqa: E731
        return map(to_device, training.batches(data, order, see, cache, args.workers))

    if fresh and "image_adapter" not in modules:
        few = training.batch_order(len(train_set), size, args.seed, 0, 8)
        with training.autocast(device, args.dtype):
            start_adapter(
                model.image_adapter, torch.cat([batch["z"] for batch in feed(train_set, few, False)])
            )
    ema = training.EMA(parameters)
    state = {"step": 0, "best": float("inf"), "modules": modules}
    if args.resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, ema)
    modules = sorted({*state["modules"], *map(runs.part_of, parameters)})

    def evaluate() -> float:
        model.eval()
        order = training.batch_order(len(val_set), min(size, len(val_set)), 0, 0, 4)
        with torch.no_grad(), training.autocast(device, args.dtype):
            values = [
                sum(loss_of(model, b, 0, i, 1.0).values()) for i, b in enumerate(feed(val_set, order, False))
            ]
        eight = iter([list(range(min(8, len(val_set))))])
        draw_samples(model, next(feed(val_set, eight, False)), out / "samples" / f"{state['step']:06}.png")
        training.train_mode(model, parameters)
        return float(torch.stack(values).mean())

    order = training.batch_order(
        len(train_set), size, args.seed, state["step"] * accumulate, steps * accumulate
    )
    stream = feed(train_set, order, args.cache)
    stop = training.Stop()
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc=task, mininterval=1)
    clock, logged = time.perf_counter(), state["step"]
    for step in bar:
        for micro in range(step * accumulate, (step + 1) * accumulate):
            with training.autocast(device, args.dtype):
                batch = next(stream)
                parts = loss_of(model, batch, args.seed, micro, step / steps)
            norms = training.backward_apart(parts, list(parameters.values()), 1 / accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
                lr=hparams["lr"],
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
    """Rows: the person, what is kept, the cloth, from the cloth, from sketch and text."""
    scale = model.cfg.vae.scale
    noise = torch.randn(batch["mean"].shape, generator=training.seeded("samples")).to(batch["mean"])
    scene = model.scene(batch["agnostic"], batch["keep"], batch["pose"])
    rows = [batch["mean"] * scale, batch["agnostic"], batch["hints"][:, 0]]
    for condition in (0, 2):
        context = model.image_adapter(batch["z"][:, condition])
        hint = batch["hints"][:, condition]
        *_, latent = model.sample(noise, scene, context, hint, 10, "dpm++", model.cfg.guidance)
        rows.append(latent)
    runs.save_sheet([model.vae.decode(row) for row in rows], path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME[=PATH]", help="toy | vitonhd | mgd")
    parser.add_argument("--task", choices=list(TASKS), default="tryon")
    training.common_arguments(parser, DEFAULTS)
    args = parser.parse_args(argv)
    training.check_arguments(args, [args.task], "--task")
    training.fast_malloc()
    if not train(args.task, args):
        print(f"train_phase2.py: stopped, {args.out} is saved: --resume goes on", file=sys.stderr)
        sys.exit(130)  # as a shell says it of what Ctrl-C ended


if __name__ == "__main__":
    training.run(main)
