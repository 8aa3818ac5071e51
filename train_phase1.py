"""Phase 1, cross-modal pre-training (Sec. 3.1): image-text pairs teach the Q-Former, then its readers, one after the other.

align      ITC + ITM                  Eq. 3-5   the Q-Former learns to compare pictures and texts
caption    ITG                        Eq. 6     the text adapter and LoRA learn to write a picture's text from Z_I
generate   q2I                        Eq. 7     the adapters and the U-Net learn to draw a picture from Z_I

    python train_phase1.py --data fashiongen fashion200k --out runs/phase1
    torchrun --nproc-per-node 8 train_phase1.py --data fashiongen --stage align --out runs/align

Defaults: full, the paper's or the official code's; tiny, chosen for two CPU cores.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from unifashion import Parser, UserError, cpu, feed, objectives, parallel, runs, seen, sheets, training
from unifashion.config import PRESETS
from unifashion.model import UniFashion, start_adapter
from unifashion.samples import TEXTS, Answers, Pairs, names, open_data, products
from weights.load import PUBLIC_PARTS, check_public, frozen_hashes, llm_tokenizer, load_public, tokenizer

TRAINABLE = {  # everything else is frozen; a test holds every parameter to this
    "align": ["qformer.*"],  # with ln_vision, query tokens, projections, ITM head, temperature
    # Sec. 3.1.2: the Q-Former is frozen
    "caption": ["text_adapter.*", "llama.*.lora_a", "llama.*.lora_b"],
    "generate": ["image_adapter.*", "style_adapter.*", "null_context", "unet.*"],
}
STAGES = {  # the frozen half, and the losses of the rest
    "align": (objectives.encode_picture, objectives.cross),
    "caption": (objectives.encode_z, objectives.caption),
    "generate": (objectives.encode_generate, objectives.generate),
}
ADAMW = {
    "align": training.ADAMW["qformer"],
    "caption": {"weight_decay": 0.0, "betas": (0.9, 0.99)},
    "generate": training.ADAMW["diffusion"],
}
# Share of the steps, then a cosine; None: a constant rate. Of align at full size: 1.5 epochs of 10, the official code's.
WARMUP = {
    "full": {"align": 0.15, "caption": 0.03, "generate": None},
    "tiny": {"align": 0.05, "caption": 0.03, "generate": None},
}
DEFAULTS = {
    "full": {  # align: the official code's; caption, generate: the paper's appendix B, caption's epochs the code's
        "align": {"batch_size": 128, "lr": 2e-5, "epochs": 10, "steps": None},
        "caption": {"batch_size": 32, "lr": 2e-5, "epochs": 2, "steps": None},
        "generate": {"batch_size": 32, "lr": 1e-4, "epochs": None, "steps": 360_000},
    },
    "tiny": {
        "align": {"batch_size": 64, "lr": 1e-3, "epochs": None, "steps": 2500},
        "caption": {"batch_size": 64, "lr": 2e-3, "epochs": None, "steps": 4500},
        "generate": {"batch_size": 16, "lr": 1e-3, "epochs": None, "steps": 3000},
    },
}


def train(
    stage: str, args: argparse.Namespace, init: Path | None, out: Path, resume: bool, stop: training.Stop
) -> bool:
    """-> whether it came to its end: False where it was asked to stop before."""
    hparams = training.override(DEFAULTS[args.preset][stage], args)
    encode, loss_of = STAGES[stage]
    device = parallel.join(training.pick_device(args.device))
    cpu.float32_where_faster(device, training.compute_dtype(device, args.dtype))
    if args.compile:
        training.check_compile(device)
    runs.check_out(out, resume)
    before = runs.previous_config(out, resume)
    init = init or before.get("init")
    if not runs.has_checkpoint(out) and init:
        runs.model_file(Path(init))  # complains before gigabytes are read
    size, accumulate, warmup = hparams["batch_size"], args.accumulate, WARMUP[args.preset][stage]
    if stage == "align" and size < 2:
        raise UserError("--batch-size is 1: align finds a picture's wrong texts in its batch, 2 at least")
    b = parallel.share(size)

    writes, draws = stage == "caption", stage == "generate"
    cfg = PRESETS[args.preset]
    # data
    words = (llm_tokenizer if writes else tokenizer)(args.preset, args.weights)
    data = open_data(args.data, TEXTS, args.allow_missing)
    samples = Answers(data, cfg, words) if writes else Pairs(data, cfg, words, draws)
    train_set, val_set = (
        feed.Readable(samples, out / "skipped.txt", args.allow_missing, part)
        for part in feed.held_out(products(data))
    )
    steps = training.planned_steps(args, hparams, len(train_set), before)
    val_batch = parallel.val_batch(size, len(val_set))

    # model
    torch.manual_seed(args.seed)  # what no file holds starts random
    llm_dtype = training.compute_dtype(device, args.dtype)  # what is frozen needs no float32
    model = load_public(args.preset, args.weights, device, draws=draws, writes=writes, llm_dtype=llm_dtype)
    if args.preset == "full":
        training.checkpointing(model)
    if not args.shard:  # which wants parameters in plain order; convolutions are a tenth faster in this one
        model.to(memory_format=torch.channels_last)
    fresh = not runs.has_checkpoint(out)  # else the checkpoint holds all of what follows
    modules = runs.load_learned(model, runs.model_file(Path(init))) if fresh and init else []
    if fresh and stage != "align" and "qformer" not in {*modules, *PUBLIC_PARTS[args.preset]}:
        raise UserError(
            f"of preset {args.preset} no file holds a Q-Former: --init wants a run of stage align or later"
        )
    files = frozen_hashes(args.preset, args.weights)
    config = {**vars(args), **hparams, "stage": stage, "steps": steps, "init": init, "company": files}
    config |= {
        **ADAMW[stage],
        "warmup": warmup,
        "curriculum": training.CURRICULUM[args.preset],
        "samples": len(train_set),
    }
    # Under --stage all, init of a later stage is the previous stage's folder. It may have moved, so it is not compared.
    if args.stage == "all" and stage != "align" and not fresh:
        config["init"] = before.get("init")
    runs.start_run(out, config, resume)

    def stream(part: Dataset, order: Iterator[list[int]], cache: dict | None = None) -> Iterator[dict]:
        return feed.stream(part, order, lambda x: encode(model, x), device, cache, args.workers)

    if fresh and parallel.rank() == 0:
        for part in sorted(set(map(runs.part_of, TRAINABLE[stage]))):
            start = "starts as published" if part in PUBLIC_PARTS[args.preset] else "starts anew"
            tqdm.write(f"{part} {f'goes on from {init}' if part in modules else start}", file=sys.stderr)
    if fresh and stage != "align" and TRAINABLE[stage][0].removesuffix(".*") not in modules:
        order = feed.batch_order(len(train_set), size, args.seed, 0, 8)
        with training.autocast(device, args.dtype):
            z = parallel.gather(torch.cat([batch["z"] for batch in stream(train_set, order)]))
        if writes:  # soft prompts as large as the embeddings of words; `floor` keeps small differences
            as_words = float(model.llama.embed.weight.detach().float().std())
            start_adapter(model.text_adapter, z, as_words, floor=1e-4)
        else:
            start_adapter(model.image_adapter, z)
    parallel.broadcast_(model.parameters() if fresh else ())
    if args.shard and parallel.world() > 1:
        parallel.shard(model.shards())
    if args.compile and draws:
        training.compile_parts(model.unet)
    # what learns, and how fast
    parameters = training.set_trainable(model, TRAINABLE[stage])
    training.train_mode(model, parameters)
    # Soft prompts start as what the LLM can read, and the rate that LoRA needs would spoil that: a tenth, as LLaVA gives its
    # projector beside LoRA.
    lr = hparams["lr"]
    slower = {
        "qformer.temp": min(lr, training.TEMPERATURE_LR),
        "text_adapter.weight": lr / 10,
        "text_adapter.bias": lr / 10,
    }
    groups = [{"params": [p], "peak": slower[name]} for name, p in parameters.items() if name in slower]
    groups = [{"params": [p for name, p in parameters.items() if name not in slower], "peak": lr}, *groups]
    optimizer = torch.optim.AdamW(
        groups,
        **ADAMW[stage],
        fused=not args.shard,  # one kernel cannot have shards beside whole tensors
        foreach=False,
    )
    ema = training.EMA(parameters) if draws else None
    state = {"step": 0, "best": float("inf"), "modules": modules}
    if resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, ema)
    model.carried = seen.remember(model.carried, data.values())
    modules = sorted({*state["modules"], *map(runs.part_of, parameters)})

    kept = {} if args.cache else None  # of the samples that are held out

    @torch.no_grad()
    def evaluate() -> float:
        """The sum of the losses, mean over four fixed batches of held-out products, with fixed noise and hard negatives."""
        model.eval()
        values = []
        path = out / "samples" / f"{state['step']:06}"
        order = feed.batch_order(len(val_set), val_batch * parallel.world(), 0, 0, 4)
        with training.autocast(device, args.dtype):
            for i, batch in enumerate(stream(val_set, order, kept)):
                rng = training.BatchRNG(f"val {stage}", 0, i, val_batch, device)
                values.append(sum(loss_of(model, batch, rng, 1.0).values()))
            shown = next(feed.batch_order(len(val_set), min(8, len(val_set)), 0, 0, 1))
            batch = next(stream(val_set, iter([shown * parallel.world()]), kept))  # the same in every process
            if writes:
                sheets.save_captions(model, words, batch["z"], batch, path.with_suffix(".txt"))
            elif draws:
                draw_samples(model, batch, path.with_suffix(".png"))
            else:
                sheets.save_matches(model, words, batch, path.with_suffix(".txt"))
        training.train_mode(model, parameters)
        return float(parallel.mean(torch.stack(values)).mean())

    order = feed.batch_order(len(train_set), size, args.seed, state["step"] * accumulate, steps * accumulate)
    # the loop
    keeps = args.cache and feed.come_again(steps * accumulate * size, len(train_set))
    feeder = stream(train_set, order, {} if keeps else None)
    watch = runs.NaNWatch(out, {stage: names(data)}, device)
    stop.install()
    bar = tqdm(
        range(state["step"], steps), desc=stage, initial=state["step"], total=steps, mininterval=1,
        disable=parallel.rank() > 0,
    )  # fmt: skip
    clock, logged = time.perf_counter(), state["step"]
    for step in bar:
        rate = 1.0
        if warmup is not None:
            rate = training.cosine(step, steps, warmup=max(1, int(steps * warmup)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        for micro in range(step * accumulate, (step + 1) * accumulate):
            with training.autocast(device, args.dtype):
                batch = next(feeder)
                torch.manual_seed(parallel.rank_seed(args.seed + micro))  # of dropout: by the step alone
                rng = training.BatchRNG(stage, args.seed, micro, b, device)
                hardness = training.hardness(step, steps, training.CURRICULUM[args.preset])
                parts = loss_of(model, batch, rng, hardness)
            norms = training.clipped_backward(parts, list(parameters.values()), 1 / accumulate)
            watch.see(step, stage, parts, norms, batch["index"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()
        state["step"] = step + 1
        evaluates = state["step"] % args.eval_every == 0 or state["step"] == steps
        leaves = stop.asked_anywhere()
        if step % 20 == 0 or evaluates or leaves:
            shown = {name: round(float(parallel.mean(value)), 4) for name, value in parts.items()}
            bar.set_postfix(shown)
            watch.check()
            seconds = round((time.perf_counter() - clock) / (step + 1 - logged), 3)
            logged = step + 1
            row = {"lr": lr * rate, "norms": [round(n, 3) for n in norms.tolist()], "seconds": seconds}
            runs.log_line(out, step=step, **shown, **row)
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
    sheets.save_sheet([model.vae.decode(batch["mean"] * scale), model.vae.decode(latent)], path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME[=PATH]", help=" | ".join(["toy", *TEXTS])
    )
    parser.add_argument(
        "--stage",
        choices=["all", *STAGES],
        default="all",
        help="all: one after the other (default %(default)s)",
    )
    training.common_arguments(parser, DEFAULTS)
    parallel.meet()
    args = parser.parse_args(argv)
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    training.check_arguments(args, stages, "--stage")
    cpu.fast_malloc()
    for name in args.data:
        training.name_and_path(name, ("toy", *TEXTS))  # all of them are pictures with texts
    init, stop = args.init, training.Stop()
    begun = [stage for stage in stages if (args.out / stage / "config.json").is_file()]
    if len(stages) > 1 and args.resume and not begun:
        raise UserError(f"nothing to resume: {args.out} holds no run")
    if len(stages) > 1:  # what a later stage lacks is told before the first has trained
        parallel.join(training.pick_device(args.device))  # of several processes one takes the folders' locks
        open_data(args.data, TEXTS, args.allow_missing)
        for stage in stages:
            writes = stage == "caption"
            (llm_tokenizer if writes else tokenizer)(args.preset, args.weights)
            check_public(args.preset, args.weights, stage == "generate", writes)
            runs.check_out(args.out / stage, args.resume and stage in begun)
    for stage in stages:
        out, resume = args.out, args.resume
        if len(stages) > 1:  # a stage that had not begun when the others were stopped begins now
            out = args.out / stage
            resume = args.resume and stage in begun
        ended = train(stage, args, init, out, resume, stop)
        if not ended or (stop.asked_anywhere() and stage != stages[-1]):
            if parallel.rank() == 0:
                print(f"train_phase1.py: stopped, {out} is saved: --resume goes on", file=sys.stderr)
            return
        init = out


if __name__ == "__main__":
    training.run(main)
