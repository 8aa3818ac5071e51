"""The paper in miniature: its Tables 1 to 5 on ToyFashion, every row trained from nothing, with three seeds.

    python -m eval.miniature --data toy                    runs what is missing, then tells: hours, but it can be stopped at any time
    python -m eval.miniature --data toy --jobs 0           only tells what there is
    python -m eval.miniature --data toy --jobs 0 --out docs/miniature --report eval/miniature.md     what we had

For each seed everything is trained anew, with the tiny preset's rates and batches and fewer steps (`STEPS`), but for the frozen
ViT, VAE and LLM of weights/tiny:

    align -> caption -> generate                           phase 1
             annotate                                      captions by that captioner, from pictures alone: of the targets of
                                                           training, and of all pictures that composed search is measured on
             base | llm | llm-cap | q2i | diff             phase 2 five times, from the same phase 1: Table 5's rows (`VARIANTS`)
             each, and phase 1 alone, measured by eval.retrieval, eval.composed, eval.captioning; the last by eval.generation

Every variant takes the same number of steps of each task that it has, so those with more tasks train longer: a new objective
comes on top. What is measured is the last step: nothing is chosen, so nothing can be chosen on the reported
split. All is measured in float32; the captions that composed search reads are written in training's dtype.

OUT/settings.json   what all was asked for; with anything else, it is another folder's
OUT/jobs.jsonl      what each job took, sitting by sitting; of a sitting whose parent was killed (-9) nothing
OUT/seedN/lock      held while jobs of this seed are at work, also those that a killed parent left: on Linux they save and end

Jobs that are done are not done again, and a job that was killed goes on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

import infer
import train_phase1
import train_phase2
from eval import captioning, composed, generation, jobs, retrieval
from eval import miniature_tables as tables
from eval.report import save_json
from eval.timing import machine
from unifashion import Parser, UserError, training
from unifashion.data import read_json, toy
from unifashion.data.fashioniq import CATEGORIES
from unifashion.data.readers import in_toy
from weights.load import FOLDERS, LEARNED

SEEDS = (0, 1, 2)
STEPS = {"align": 600, "caption": 700, "generate": 500}  # phase 1
TASK_STEPS = {"retrieval": 100, "cir": 350, "caption": 200, "tryon": 500}
EVALUATIONS = ("retrieval", "composed", "captioning", "generation")
DEFAULTS = {
    "search": Path("data/toy-search"),
    "out": Path("runs/miniature"),
    "device": "auto",
    "dtype": "auto",
}
DTYPES = "dtypes of training"
EVALUATE = 300  # steps between checkpoints
TRIPLETS = 3  # one in so many of ToyFashion's training triplets
VARIANTS = {  # the rows of Table 5: tasks, and what Eq. 13 is left without
    "base": (("retrieval", "cir"), "itg,q2i,caption"),
    "llm": (("retrieval", "cir", "caption"), "q2i,caption"),
    "llm-cap": (("retrieval", "cir", "caption"), "q2i"),
    "q2i": (("retrieval", "cir", "caption"), ""),  # not the paper's: Eq. 12 without try-on's steps
    "diff": (("retrieval", "cir", "caption", "tryon"), ""),
}


# What is done


def jobs_of(seed: int) -> dict[str, list[str]]:
    """{job: those that must be done before}, those that take longest first: so no core waits for the last of them."""
    s = f"seed{seed}"
    longest_first = [*reversed(VARIANTS)]
    order = {f"{s}/align": [], f"{s}/caption": [f"{s}/align"]}
    order |= {f"{s}/generate": [f"{s}/caption"], f"{s}/annotate": [f"{s}/caption"]}
    order |= {f"{s}/{name}": [f"{s}/generate", f"{s}/annotate"] for name in longest_first}
    measured = {
        f"{s}/{name}/measure": [f"{s}/{name}", f"{s}/annotate"] for name in (*longest_first, "generate")
    }
    return order | measured


def do(job: str, args: argparse.Namespace) -> None:
    """One job, in this process."""
    seed, name, *measuring = job.split("/")
    home = args.out / seed
    if measuring:
        measure(home / name, home, args)
    elif name == "annotate":
        annotate(home, args)
    elif name in STEPS:
        phase1(name, home, args)
    else:
        phase2(name, home, args)


def phase1(stage: str, home: Path, args: argparse.Namespace) -> None:
    before = {"align": None, "caption": "align", "generate": "caption"}[stage]
    flags = ["--stage", stage, "--steps", str(STEPS[stage]), "--data", *texts_of(args.world)]
    flags += ["--init", str(home / before)] if before else []
    train_phase1.main([*flags, *common_flags(home, stage, args)])
    check_ended(home / stage)


def phase2(variant: str, home: Path, args: argparse.Namespace) -> None:
    tasks, without = VARIANTS[variant]
    for task, steps in TASK_STEPS.items():
        train_phase2.DEFAULTS["tiny"][task]["steps"] = steps
    data = [*texts_of(args.world), f"fashioniq={home / 'fashioniq'}"]
    data += [f"mgd={in_toy(args.world, 'mgd')}"] if "tryon" in tasks else []
    flags = ["--task", *tasks, "--data", *data, "--init", str(home / "generate")]
    flags += ["--without", without] if without else []
    train_phase2.main([*flags, *common_flags(home, variant, args)])
    check_ended(home / variant)


def check_ended(run: Path) -> None:
    """Raise UserError for a run that was stopped: it is not done, and goes on the next time."""
    step, steps = (read_json(run / f)[k] for f, k in (("last/state.json", "step"), ("config.json", "steps")))
    if step < steps:
        raise UserError(
            f"{run} was stopped after {step} of {steps} steps: say the command again, and it goes on"
        )


def texts_of(world: Path) -> list[str]:
    return [f"{name}={in_toy(world, name)}" for name in ("fashiongen", "fashioniq-cap")]


def common_flags(home: Path, run: str, args: argparse.Namespace) -> list[str]:
    flags = ["--preset", "tiny", "--out", str(home / run), "--seed", home.name.removeprefix("seed")]
    flags += ["--device", args.device, "--dtype", args.dtype, "--cache", "--workers", "0"]
    flags += ["--eval-every", str(EVALUATE)]
    return flags + ["--resume"] * (home / run / "config.json").is_file()


def annotate(home: Path, args: argparse.Namespace) -> None:
    """A Fashion-IQ of our own: some of ToyFashion's triplets, with captions of their targets by this seed's captioner."""
    weights = weights_of(home / "caption")
    source, ours = in_toy(args.world, "fashioniq").resolve(), home / "fashioniq"
    (ours / "captions").mkdir(parents=True, exist_ok=True)
    targets = set()
    for category in CATEGORIES:
        name = f"captions/cap.{category}.train.json"
        rows = read_json(source / name)[::TRIPLETS]
        (ours / name).write_text(json.dumps(rows))
        targets |= {row["target"] for row in rows}
    for name in ("images", "image_splits"):
        if not (ours / name).exists():
            (ours / name).symlink_to(source / name)
    pictures = {path.stem: path for path in (source / "images").iterdir()}
    searched = (in_toy(args.search, "fashioniq") / "images").resolve()
    flags = ["--style", "fashioniq-cap", "--preset", "tiny", "--weights", str(weights)]
    flags += ["--device", args.device, "--dtype", args.dtype]
    for out, folder, files in (
        (ours / "captions.jsonl", home / "targets", sorted(pictures[t] for t in targets)),
        (home / "searched.jsonl", home / "searched", sorted(searched.iterdir())),
    ):
        folder.mkdir(exist_ok=True)
        for file in files:
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        if infer.main(["caption", *flags, "--image", str(folder), "--out", str(out)]):
            raise UserError(f"{out} could not be written")
        # A captioner of so few steps may have nothing to say of a picture: then it says this, since search refuses an empty caption.
        save_text(out.read_text().replace('"caption": ""', '"caption": "a garment"'), out)


def weights_of(run: Path) -> Path:
    """A folder of weights with the run's last step in it, which holds all that was learned before, and what it was trained beside."""
    folder = run / "weights"
    folder.mkdir(exist_ok=True)
    learned = LEARNED["tiny"]
    files = [file for file in FOLDERS["tiny"].iterdir() if file.suffix in (".safetensors", ".model", ".txt")]
    for file in [file for file in files if file.name != learned] + [run.resolve() / "last" / learned]:
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file)
    return folder


def measured_of(run: str) -> set[str]:
    """What `measure` makes of a run."""
    return {e for e in EVALUATIONS if e != "generation" or "tryon" in VARIANTS.get(run, ((),))[0]}


def measure(run: Path, home: Path, args: argparse.Namespace) -> None:
    """RUN/retrieval.json, composed.json, captioning.json, and where it was trained to draw generation.json: what is not there."""
    common = ["--weights", str(weights_of(run)), "--device", args.device, "--dtype", "fp32", "--quiet"]
    searched, drawn = ["--data", f"toy={args.search}"], ["--data", f"toy={args.world}"]
    evaluations = {
        "retrieval": (retrieval.main, searched),
        "composed": (composed.main, [*searched, "--captions", str(home / "searched.jsonl")]),
        "captioning": (captioning.main, [*drawn, "--styles", "fashiongen"]),
    }
    if "generation" in measured_of(run.name):
        flags = ["--samples", "200", "--sampler", "dpm++", "--steps", "10", "--judge"]
        flags += [str(args.out / "judge"), "--sheet", str(run / "drawn.png")]
        evaluations["generation"] = (generation.main, [*drawn, *flags])
    for name, (main_of, flags) in evaluations.items():
        if not (out := run / f"{name}.json").is_file():
            main_of([*flags, *common, "--out", str(out)])


# How it is done


def carry_out(args: argparse.Namespace) -> None:
    """All jobs that are not done, `args.jobs` at a time, each in a process of its own, on a CPU pinned to its own cores."""
    places, device = jobs.places_of(args.jobs), training.pick_device(args.device)
    on = {"device": device.type, "machine": machine(device, training.compute_dtype(device, args.dtype))}
    running: dict[str, tuple[subprocess.Popen, int, float]] = {}
    cpu = jobs.cpu_of_ended()

    def ended(job: str) -> int:
        nonlocal cpu
        process, place, began = running.pop(job)
        row = {"job": job, "code": process.returncode, "seconds": round(time.time() - began)}
        row |= {"cpu seconds": round(jobs.cpu_of_ended() - cpu), "cores": len(places[place]), **on}
        cpu = jobs.cpu_of_ended()
        jobs.note(args.out, row)
        return process.returncode

    with ExitStack() as locks:
        for seed in args.seeds:
            locks.enter_context(jobs.locked(args.out / f"seed{seed}"))
        every = [job for seed in args.seeds for job in jobs_of(seed).items()]
        waiting = dict(sorted(every, key=lambda job: "/q2i" in job[0]))  # what the paper has not comes last
        done = {job for job in waiting if jobs.is_done(args.out, job)}
        bar = tqdm(total=len(waiting), initial=len(done), desc="jobs", unit="job", disable=args.quiet)
        waiting = {job: needs for job, needs in waiting.items() if job not in done}
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what follows is done
        try:
            while waiting or running:
                free = set(range(len(places))) - {place for _, place, _ in running.values()}
                ready = [job for job, needs in waiting.items() if done.issuperset(needs)]
                for job, place in zip(ready, sorted(free), strict=False):
                    del waiting[job]
                    running[job] = (start(job, places[place], args), place, time.time())
                bar.set_postfix_str(", ".join(running))
                time.sleep(1)
                for job in list(running):
                    if running[job][0].poll() is None:
                        continue
                    if ended(job):  # before the next is asked, whose CPU time counts from then
                        raise UserError(f"{job} failed: {log_of(args.out, job)} tells why")
                    done.add(job)
                    bar.update()
        finally:
            bar.close()
            for process, *_ in running.values():  # they save what they have, and end
                process.terminate()
            for job, (process, *_) in list(running.items()):
                process.wait()
                ended(job)
            signal.signal(signal.SIGTERM, before)


def start(job: str, place: list[int], args: argparse.Namespace) -> subprocess.Popen:
    log = log_of(args.out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--data", f"toy={args.world}", "--search", str(args.search), "--out", str(args.out)]
    flags += ["--job", job, "--device", args.device, "--dtype", args.dtype]
    command = [sys.executable, "-m", "eval.miniature", *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(len(place))}
    with open(log, "a") as file:  # close_fds: the lock is for it, too
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, close_fds=False)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, place)
    return process


def log_of(out: Path, job: str) -> Path:
    return out / f"{job}.log"


def agree(args: argparse.Namespace) -> None:
    """Write OUT/settings.json. Raise UserError, having written nothing, if OUT was begun with others: rows would not be comparable."""
    dtype = training.compute_dtype(training.pick_device(args.device), args.dtype)
    dtype = str(dtype).removeprefix("torch.")
    settings = {
        "steps of phase 1": STEPS,
        "steps of phase 2": TASK_STEPS,
        "variants": VARIANTS,
        "one triplet in": TRIPLETS,
        "trained on": read_json(args.world / "toy.json"),
        "searched": read_json(args.search / "toy.json"),
    }
    settings, file = json.loads(json.dumps(settings)), args.out / "settings.json"
    with jobs.locked(args.out):
        before = read_json(file) if file.is_file() else settings
        # Each seed has its own: rows are compared within a seed, and the next one may find another machine.
        dtypes = {seed: x for seed, x in before.pop(DTYPES, {}).items() if is_begun(args.out / seed)}
        asked = dict.fromkeys((f"seed{seed}" for seed in args.seeds), dtype)
        pairs = {k: (before.get(k), settings.get(k)) for k in before | settings}
        pairs |= {f"{seed} in": (dtypes.get(seed, dtype), dtype) for seed in asked}
        if other := [f"{k} {was}, not {is_now}" for k, (was, is_now) in pairs.items() if was != is_now]:
            raise UserError(
                f"{args.out} was begun with {'; '.join(other)}: ask for the same, or name another --out"
            )
        save_json(settings | {DTYPES: dtypes | asked}, file)


def is_begun(home: Path) -> bool:
    return home.is_dir() and any(file.name != "lock" for file in home.iterdir())


# How it is told


def results_of(out: Path, seeds: Sequence[int]) -> tables.Results:
    """{seed: {run: {evaluation: its JSON}}}, of what is there"""
    found: tables.Results = {}
    for seed in seeds:
        for run in ("generate", *VARIANTS):
            files = sorted((out / f"seed{seed}" / run).glob("*.json"))
            of = {file.stem: read_json(file) for file in files if file.stem in EVALUATIONS}
            if of:
                found.setdefault(seed, {})[run] = of
    return found


def about(args: argparse.Namespace, results: tables.Results) -> dict[str, str]:
    """What a reader must know of how the figures came about."""
    rows = jobs.noted(args.out)
    took = [row for row in rows if int(row["job"].split("/")[0].removeprefix("seed")) in results]
    told = [
        (f"seed{k}/{run}", of) for k, runs in results.items() for run in runs for of in runs[run].values()
    ]
    verdicts: dict[str, dict[str, None]] = {}
    for run, of in told:
        verdicts.setdefault(of["verdict"], {})[run] = None
    pairs = [(k, runs, run) for k, runs in results.items() for run in tables.NAMES]
    absent = [f"seed{k}/{run}" for k, runs, run in pairs if set(runs.get(run, ())) != measured_of(run)]
    trained = [
        args.out / f"seed{seed}" / run / "last/state.json" for seed in results for run in (*STEPS, *VARIANTS)
    ]
    file = args.out / "settings.json"
    asked = {"steps of phase 1": STEPS, "steps of phase 2": TASK_STEPS}
    asked |= read_json(file) if file.is_file() else {}
    device = training.pick_device(args.device)
    here = machine(device, training.compute_dtype(device, args.dtype))
    machines = sorted({row["machine"] for row in took if "machine" in row})
    commits = {of["commit"] for _, of in told} | {read_json(f)["commit"] for f in trained if f.is_file()}
    return {
        "command": "; ".join(f"`{command}`" for command in commands_of(args, results, asked)),
        "commit": ", ".join(sorted(commits)),
        "machine": "; ".join(machines) or f"not noted; told on {here}",
        "time": f"{jobs.told_hours(took)}, in {len({row['job'] for row in took})} jobs; sittings that were killed (-9) are not in it",
        "seeds": ", ".join(map(str, results)) + f"; not yet measured: {', '.join(absent)}" * bool(absent),
        "steps": "; ".join(
            f"phase {i}: " + ", ".join(f"{k} {v}" for k, v in asked[f"steps of phase {i}"].items())
            for i in (1, 2)
        ),
        "verdict of the leak guard": ". ".join(
            verdict + f" ({', '.join(runs)})" * (len(verdicts) > 1)
            for verdict, runs in sorted(verdicts.items())
        ),
        "each run's own report": f"{args.out}/seedN/RUN/*.json: command, protocol, hashes of data and Q-Former, intervals over cases",
    }


def commands_of(args: argparse.Namespace, seeds: Iterable[int], asked: dict) -> list[str]:
    """What says it again, in however many sittings it was said, one for each dtype; --out is a place and no more."""
    common = ["python", "-m", "eval.miniature", "--data", args.data]
    for name in ("search", "device"):
        if getattr(args, name) != DEFAULTS[name]:
            common += [f"--{name}", str(getattr(args, name))]
    short = {"float32": "fp32", "bfloat16": "bf16"}
    of: dict[str, list[int]] = {}
    for seed in seeds:
        dtype = asked.get(DTYPES, {}).get(f"seed{seed}")
        of.setdefault(short.get(dtype, args.dtype), []).append(seed)
    chosen = {dtype: ["--seeds", *map(str, some)] * (tuple(some) != SEEDS) for dtype, some in of.items()}
    return [shlex.join([*common, "--dtype", dtype, *some]) for dtype, some in chosen.items()]


def save_text(text: str, path: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="toy[=PATH]", help="ToyFashion, to train on and to draw for")
    add("--search", type=Path, help="ToyFashion to search in (%(default)s)")
    add("--out", type=Path, help="default %(default)s")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="default 0 1 2")
    add("--jobs", type=int, default=2, help="at a time; 0: none, only tell (default %(default)s)")
    add("--report", type=Path, metavar="FILE", help="Markdown (default: miniature.md in --out)")
    add("--job", help=argparse.SUPPRESS)
    add("--device", help="auto | cpu | cuda")
    add("--dtype", choices=["auto", "fp32", "bf16"], help="of training; auto: bf16 where it is quick")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    if (
        min(args.seeds) < 0
        or len(set(args.seeds)) < len(args.seeds)
        or len(args.seeds) not in tables.T95.keys() | {1}
    ):
        raise UserError(f"--seeds must be 0 or more, each once, {max(tables.T95)} at most")
    if args.jobs < 0:
        raise UserError("--jobs must be 0 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.dtype = jobs.quick_dtype(training.pick_device(args.device)) if args.dtype == "auto" else args.dtype
    args.world = training.name_and_path(args.data, ("toy",))[1]
    if args.job or args.jobs:  # telling needs no world
        args.world = training.toy_folder(args.world)
        if not args.search.exists():
            toy.ensure(args.search, seed=1, train=0, val=0, test=2000)
        args.search = training.toy_folder(args.search)
    if args.job:
        jobs.end_with_parent()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        return do(args.job, args)
    if args.jobs:
        args.out.mkdir(parents=True, exist_ok=True)
        agree(args)
        carry_out(args)
    results = results_of(args.out, args.seeds)
    if not results:
        raise UserError(f"{args.out} holds no results: leave --jobs out")
    file = args.report or args.out / "miniature.md"
    sheets = {
        k: args.out / f"seed{k}/diff/drawn.png" for k in results if "generation" in results[k].get("diff", {})
    }
    pictures = {seed: os.path.relpath(sheet, file.parent) for seed, sheet in sheets.items()}
    report = tables.report(results, about(args, results), pictures)
    save_text(report, file)
    print(report)


if __name__ == "__main__":
    training.run(main)
