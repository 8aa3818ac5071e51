"""Phase 2, composed multimodal fine-tuning (Sec. 3.2): one Q-Former for every task, which are mixed step by step.

retrieval  L_cross of pictures and their texts       Eq. 5          so that search is not forgotten
cir        reference + modification text -> target   Eq. 9-13       composed retrieval, its caption, its picture
caption    ITG of a picture's text from Z_I          Eq. 6          the LLM is frozen: the Q-Former learns to be read
tryon      q2I of a person in a garment              Eq. 7, Fig. 3  try-on and design: adapters, U-Net, garment encoder learn, too

    python train_phase2.py --data fashiongen fashioniq vitonhd --init runs/phase1/generate --out runs/phase2
    torchrun --nproc-per-node 8 train_phase2.py --shard --data fashiongen fashioniq mgd --init runs/phase1/generate --out runs/phase2

Each task has as many steps as it would have alone, spread evenly over the run. `--without` leaves out parts of Eq. 13 for the
rows of Table 5: itg,q2i,caption is its Base, q2i,caption +LLM, q2i +LLM with captions.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from unifashion import Parser, UserError, cpu, feed, objectives, parallel, runs, seen, sheets, training
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.data.readers import DATA_SETS
from unifashion.model import UniFashion
from unifashion.samples import (
    COMPOSED,
    PERSONS,
    TEXTS,
    Answers,
    Pairs,
    Scenes,
    Triplets,
    names,
    open_data,
    products,
)
from unifashion.tokenizers import SentencePiece, WordPiece
from weights.load import PUBLIC_PARTS, frozen_hashes, llm_tokenizer, load_public, tokenizer

QFORMER = ["qformer.*"]  # with ln_vision, query tokens, projections, ITM head, temperature
DIFFUSION = ["image_adapter.*", "style_adapter.*", "null_context", "unet.*", "garment.*"]
TRAINABLE = {  # everything else is frozen, the LLM with its LoRA and adapter always; a test holds every parameter to this
    "retrieval": QFORMER,
    "cir": QFORMER,
    "caption": QFORMER,
    "tryon": [*QFORMER, *DIFFUSION],
}
TASKS = {  # data, the frozen half, the losses
    "retrieval": (TEXTS, objectives.encode_picture, objectives.cross),
    "cir": (COMPOSED, objectives.encode_composed, objectives.composed),
    "caption": (TEXTS, objectives.encode_picture, objectives.caption),
    "tryon": (PERSONS, objectives.encode_tryon, objectives.tryon),
}
PARTS = ("itg", "q2i", "caption")  # of Eq. 13, which --without leaves out
# Share of the steps, before the Q-Former's cosine. At full size: 1.5 epochs of cir's 15, the official code's.
WARMUP = {"full": 0.1, "tiny": 0.05}
# Share of the steps, at the end, over which the diffusion side's learning rate falls to 0. The paper's is constant.
DECAY = {"full": 0.0, "tiny": 0.25}
# lr (and --lr) is the Q-Former's, but tryon's is the diffusion side's. The Q-Former has one rate: that of the first task beside
# tryon, or cir's default if tryon trains alone. Epochs and batches: the official code's; tryon's: the paper's.
DEFAULTS = {
    "full": {
        "retrieval": {"batch_size": 128, "lr": 2e-5, "epochs": 10, "steps": None},
        "cir": {"batch_size": 128, "lr": 2e-5, "epochs": 15, "steps": None},
        "caption": {"batch_size": 32, "lr": 2e-5, "epochs": 2, "steps": None},
        "tryon": {"batch_size": 32, "lr": 1e-4, "epochs": None, "steps": 360_000},
    },
    "tiny": {
        "retrieval": {"batch_size": 64, "lr": 3e-4, "epochs": None, "steps": 600},
        "cir": {"batch_size": 32, "lr": 3e-4, "epochs": None, "steps": 1800},
        "caption": {"batch_size": 32, "lr": 3e-4, "epochs": None, "steps": 2400},
        "tryon": {"batch_size": 16, "lr": 1e-3, "epochs": None, "steps": 28_000},
    },
}


class Mix:
    """Deterministic interleaving: each step goes to the task furthest behind its share, steps[t] / total, of the steps so far."""

    def __init__(self, steps: dict[str, int]) -> None:
        self.steps, self.total = steps, sum(steps.values())
        self.done = dict.fromkeys(steps, 0)

    def next(self) -> str:
        s = sum(self.done.values()) + 1
        task = max(self.steps, key=lambda t: self.steps[t] * s / self.total - self.done[t])
        self.done[task] += 1
        return task


def train(args: argparse.Namespace) -> bool:
    """-> whether it came to its end: False where it was asked to stop before."""
    defaults, cfg, out = DEFAULTS[args.preset], PRESETS[args.preset], args.out
    device = parallel.join(training.pick_device(args.device))
    cpu.float32_where_faster(device, training.compute_dtype(device, args.dtype))
    if args.compile:
        training.check_compile(device)
    runs.check_out(out, args.resume)
    before = runs.previous_config(out, args.resume)
    init = args.init or before.get("init")
    if not runs.has_checkpoint(out) and init:
        runs.model_file(Path(init))  # complains before gigabytes are read
    data = open_tasks(args)
    tasks, accumulate = list(data), args.accumulate
    hparams = {t: training.override(defaults[t], args) for t in tasks}
    lr = {
        "qformer": next((hparams[t]["lr"] for t in tasks if t != "tryon"), defaults["cir"]["lr"]),
        "diffusion": hparams.get("tryon", defaults["tryon"])["lr"],
    }
    size = {t: hparams[t]["batch_size"] for t in tasks}
    for task in {"retrieval", "cir"} & set(tasks):
        if size[task] < 2:
            raise UserError(f"--batch-size is 1: {task} compares the samples of a batch, 2 at least")
    b = {t: parallel.share(size[t]) for t in tasks}

    # data
    writes = "caption" in tasks or ("cir" in tasks and "itg" not in args.without)
    draws = "tryon" in tasks or ("cir" in tasks and "q2i" not in args.without)
    words = tokenizer(args.preset, args.weights)
    llm_words = llm_tokenizer(args.preset, args.weights) if writes else None
    train_set, val_set, sample_names, steps, val_batch = {}, {}, {}, {}, {}
    for task in tasks:
        samples, parts, sample_names[task] = samples_of(task, data[task], cfg, words, llm_words, args)
        train_set[task], val_set[task] = (
            feed.Readable(samples, out / f"skipped.{task}.txt", args.allow_missing, part) for part in parts
        )
        asked = {"steps": n} if (n := before.get("task_steps", {}).get(task)) else {}  # none: refused below
        steps[task] = training.planned_steps(args, hparams[task], len(train_set[task]), asked)
        val_batch[task] = parallel.val_batch(size[task], len(val_set[task]))
    total = sum(steps.values())

    # model
    torch.manual_seed(args.seed)
    llm_dtype = training.compute_dtype(device, args.dtype)  # what is frozen needs no float32
    model = load_public(args.preset, args.weights, device, draws=draws, writes=writes, llm_dtype=llm_dtype)
    if args.preset == "full":
        training.checkpointing(model)
    if not args.shard:  # which wants parameters in plain order; convolutions are a tenth faster in this one
        model.to(memory_format=torch.channels_last)
    fresh = not runs.has_checkpoint(out)  # else the checkpoint holds all of what follows
    modules = runs.load_learned(model, runs.model_file(Path(init))) if fresh and init else []
    for part, stage, needed in (
        ("qformer", "align", True),
        ("text_adapter", "caption", writes),
        ("image_adapter", "generate", draws),
    ):
        if fresh and needed and part not in {*modules, *PUBLIC_PARTS[args.preset]}:
            raise UserError(
                f"of preset {args.preset} no file holds a trained {part}: --init wants a run of train_phase1.py, "
                f"stage {stage} or later"
            )
    if draws and model.garment.untrained:  # a run that goes on loads what it had over this
        model.garment.start_from(model.unet.encoder, model.unet.time_embed)
    config = {
        **{
            k: v for k, v in vars(args).items() if k not in ("batch_size", "lr", "epochs")
        },  # each task's own follow
        **{f"{t} {k}": v for t in tasks for k, v in hparams[t].items() if k in ("batch_size", "lr")},
        "stage": "phase2",  # the name that phase 1 uses: neither goes on with the other's run
        "task": tasks,
        "steps": total,
        "task_steps": steps,
        "curriculum": training.CURRICULUM[args.preset],
        "samples": {t: len(train_set[t]) for t in tasks},
        "init": init,
        "company": frozen_hashes(args.preset, args.weights),
    }
    runs.start_run(out, config, args.resume)
    if fresh and parallel.rank() == 0:
        tqdm.write(f"{', '.join(modules)} go on from {init}", file=sys.stderr)
    parallel.broadcast_(model.parameters() if fresh else ())
    if args.shard and parallel.world() > 1:
        parallel.shard(model.shards())

    if args.compile and draws:
        training.compile_parts(model.unet, model.garment)
    # what learns, and how fast
    table = {t: [p for p in TRAINABLE[t] if not (args.freeze_diffusion and p == "unet.*")] for t in tasks}
    parameters = training.set_trainable(model, sorted({p for t in tasks for p in table[t]}))
    training.train_mode(model, parameters)
    diffusion = {name: p for name, p in parameters.items() if not name.startswith("qformer.")}
    temperature = parameters["qformer.temp"]
    qformer = [p for name, p in parameters.items() if name not in diffusion and p is not temperature]
    slow_lr = min(lr["qformer"], training.TEMPERATURE_LR)
    optimizer = torch.optim.AdamW(
        [
            {"params": qformer, "peak": lr["qformer"], **training.ADAMW["qformer"]},
            {"params": [temperature], "peak": slow_lr, **training.ADAMW["qformer"]},
            {"params": list(diffusion.values()), "peak": lr["diffusion"], **training.ADAMW["diffusion"]},
        ],
        fused=not args.shard,  # one kernel cannot have shards beside whole tensors
        foreach=False,
    )
    ema = training.EMA(diffusion) if diffusion else None
    state = {"step": 0, "best": float("inf"), "modules": modules}
    if args.resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, ema)
    model.carried = seen.remember(model.carried, (part for of in data.values() for part in of.values()))
    modules = sorted({*state["modules"], *map(runs.part_of, parameters)})

    losses_of = {t: TASKS[t][2] for t in tasks}
    if "cir" in tasks:
        losses_of["cir"] = partial(objectives.composed, without=tuple(args.without))

    def stream(
        task: str, part: Dataset, order: Iterator[list[int]], cache: dict | None = None
    ) -> Iterator[dict]:
        encode = partial(TASKS[task][1], model)
        return feed.stream(part, order, encode, device, cache, args.workers)

    kept = {t: {} if args.cache else None for t in tasks}  # of the samples that are held out

    @torch.no_grad()
    def evaluate() -> float:
        """
        The geometric mean over the tasks, since their losses differ in scale, of the sum of a task's losses: mean over four fixed
        batches of held-out products, with fixed noise and hard negatives.
        """
        model.eval()
        values = []
        for task in tasks:
            part = val_set[task]
            order = feed.batch_order(len(part), val_batch[task] * parallel.world(), 0, 0, 4)
            with training.autocast(device, args.dtype):
                losses = [
                    sum(
                        losses_of[task](
                            model, batch, training.BatchRNG(f"val {task}", 0, i, val_batch[task], device), 1.0
                        ).values()
                    )
                    for i, batch in enumerate(stream(task, part, order, kept[task]))
                ]
                shown = next(feed.batch_order(len(part), min(8, len(part)), 0, 0, 1))
                batch = next(
                    stream(task, part, iter([shown * parallel.world()]), kept[task])
                )  # in every process
                path = out / "samples" / f"{state['step']:06}.{task}.txt"
                if task == "caption":
                    sheets.save_captions(model, llm_words, objectives.z_i(model, batch), batch, path)
                elif task == "tryon":
                    draw_samples(model, batch, path.with_suffix(".png"))
                else:
                    sheets.save_matches(model, words, batch, path)
            values.append(float(parallel.mean(torch.stack(losses)).mean()))
            runs.log_line(out, step=state["step"] - 1, **{f"val {task}": values[-1]})
        training.train_mode(model, parameters)
        return math.exp(sum(map(math.log, values)) / len(values))

    # the loop
    mix = Mix(steps)
    for _ in range(state["step"]):
        mix.next()
    feeders = {}
    for task in tasks:
        first, last = mix.done[task] * accumulate, steps[task] * accumulate
        order = feed.batch_order(len(train_set[task]), size[task], args.seed, first, last)
        keeps = args.cache and feed.come_again(last * size[task], len(train_set[task]))
        feeders[task] = stream(task, train_set[task], order, {} if keeps else None)
    stop, watch = training.Stop(), runs.NaNWatch(out, sample_names, device)
    stop.install()
    bar = tqdm(
        range(state["step"], total), initial=state["step"], total=total, mininterval=1, desc="+".join(tasks),
        disable=parallel.rank() > 0,
    )  # fmt: skip
    clock, logged, shown = time.perf_counter(), state["step"], {}
    for step in bar:
        task = mix.next()
        qformer_factor = training.cosine(step, total, warmup=max(1, int(total * WARMUP[args.preset])))
        diffusion_factor = training.linear_decay(step, total, decay=DECAY[args.preset])
        factors = qformer_factor, qformer_factor, diffusion_factor
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = group["peak"] * factor
        for p in diffusion.values():  # cir runs the U-Net, too (Eq. 12), but there only the Q-Former learns
            p.requires_grad_(task == "tryon")
        learning = list(parameters.values()) if task == "tryon" else [*qformer, temperature]
        for micro in range(step * accumulate, (step + 1) * accumulate):
            with training.autocast(device, args.dtype):
                batch = next(feeders[task])
                torch.manual_seed(parallel.rank_seed(args.seed + micro))  # of dropout: by the step alone
                rng = training.BatchRNG(task, args.seed, micro, b[task], device)
                hardness = training.hardness(step, total, training.CURRICULUM[args.preset])
                parts = losses_of[task](model, batch, rng, hardness)
            norms = training.clipped_backward(parts, learning, 1 / accumulate)
            watch.see(step, task, parts, norms, batch["index"])
        for p in diffusion.values():
            if task != "tryon":
                p.grad = None  # FSDP computes it all the same
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if task == "tryon" and ema is not None:
            ema.update()
        shown |= {f"{task} {name}": value for name, value in parts.items()}
        state["step"] = step + 1
        evaluates = state["step"] % args.eval_every == 0 or state["step"] == total
        leaves = stop.asked_anywhere()
        if step % 20 == 0 or evaluates or leaves:
            row = {name: round(float(parallel.mean(value)), 4) for name, value in shown.items()}
            bar.set_postfix({name: value for name, value in row.items() if name.startswith(task)})
            watch.check()
            seconds = round((time.perf_counter() - clock) / (step + 1 - logged), 3)
            logged, shown = step + 1, {}
            rates = {"lr": optimizer.param_groups[0]["lr"], "lr draws": optimizer.param_groups[2]["lr"]}
            runs.log_line(
                out, step=step, **row, **rates, norms=[round(n, 3) for n in norms.tolist()], seconds=seconds
            )
        if evaluates:
            with training.averaged(ema), training.eagerly(args.compile):
                val = evaluate()
            runs.save_evaluated(out, val, model, modules, optimizer, parameters, ema, state)
        elif leaves:
            runs.save_checkpoint(out / "last", model, modules, optimizer, parameters, ema, state)
        if logged == state["step"]:  # "seconds" are those of steps alone
            clock = time.perf_counter()
        if leaves:
            break
    return state["step"] == total


def open_tasks(args: argparse.Namespace) -> dict[str, dict[str, Dataset]]:
    """{task: its data sets}. Of `all` those that have some; UserError for one that was named and has none."""
    named = [t for t in args.task if t != "all"]
    data = {
        t: open_data(args.data, TASKS[t][0], args.allow_missing)
        for t in (TASKS if "all" in args.task else named)
    }
    for task in named:
        if not data[task]:
            raise UserError(f"--task {task} wants data: one of {', '.join(('toy', *TASKS[task][0]))}")
    if (idle := [t for t in data if not data[t]]) and parallel.rank() == 0:
        print(f"train_phase2.py: without {', '.join(idle)}: --data names nothing for it", file=sys.stderr)
    if not any(data.values()):
        raise UserError("--data names nothing that a task could learn from")
    return {t: found for t, found in data.items() if found}


def samples_of(
    task: str,
    data: dict[str, Dataset],
    cfg: UniFashionConfig,
    words: WordPiece,
    llm_words: SentencePiece | None,
    args: argparse.Namespace,
) -> tuple[Dataset, tuple[list[int], list[int]], list[str]]:
    """-> the task's samples, which of them are for training and which are held out, and of each a name to tell a person."""
    if task == "cir":
        triplets = Triplets(data, cfg, words, llm_words, args.without, args.allow_missing)
        targets = triplets.targets()
        return triplets, feed.held_out(targets), targets
    parts = feed.held_out(products(data))
    if task == "caption":
        return Answers(data, cfg, llm_words), parts, names(data)
    return (Scenes if task == "tryon" else Pairs)(data, cfg, words), parts, names(data)


@torch.no_grad()
def draw_samples(model: UniFashion, batch: dict[str, Tensor], path: Path) -> None:
    """Rows: the person, what is kept, the cloth, the try-on from the cloth, the try-on from sketch and text."""
    scale, b = model.cfg.vae.scale, len(batch["mean"])
    noise = torch.randn(batch["mean"].shape, generator=training.seeded("samples")).to(batch["mean"])
    scene = model.scene(batch["agnostic"], batch["keep"], batch["pose"])
    rows = [batch["mean"] * scale, batch["agnostic"], batch["hints"][:, 0]]
    for sketch in (0, 1):
        is_sketch = torch.full((b,), sketch, device=noise.device)
        context = model.image_adapter(objectives.z_of_condition(model, batch, is_sketch, is_sketch > 0))
        hint = batch["hints"][:, sketch]
        *_, latent = model.sample(noise, scene, context, hint, 10, "dpm++", model.cfg.guidance)
        rows.append(latent)
    sheets.save_sheet([model.vae.decode(row) for row in rows], path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME[=PATH]", help=" | ".join(["toy", *DATA_SETS])
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=["all", *TASKS],
        default=["all"],
        help="all: those that --data is for (default)",
    )
    parser.add_argument(
        "--without",
        type=split_parts,
        default=(),
        metavar="PARTS",
        help=f"of Eq. 13, some of {','.join(PARTS)}",
    )
    parser.add_argument(
        "--freeze-diffusion", action="store_true", help="the U-Net stays as it is, in tryon, too (Sec. 4.4)"
    )
    training.common_arguments(parser, DEFAULTS)
    parallel.meet()
    args = parser.parse_args(argv)
    tasks = list(TASKS) if "all" in args.task else args.task
    training.check_arguments(args, tasks, "--task")
    cpu.fast_malloc()
    if not train(args) and parallel.rank() == 0:
        print(f"train_phase2.py: stopped, {args.out} is saved: --resume goes on", file=sys.stderr)


def split_parts(text: str) -> tuple[str, ...]:
    parts = tuple(sorted(text.split(",")))
    if strange := [p for p in parts if p not in PARTS]:
        raise UserError(f"--without {strange[0]}: it is some of {','.join(PARTS)}")
    return parts


if __name__ == "__main__":
    training.run(main)
