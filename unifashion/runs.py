"""The run folder: what a training leaves behind, and starts again from.

RUN/config.json     what was asked
RUN/metrics.jsonl   one line a log step, counted from 0: the losses, lr, norms of their gradients, seconds per step; val
RUN/samples/        pictures and captions
RUN/losses.png      the curves of metrics.jsonl
RUN/skipped.txt     samples that could not be read, and why; in phase 2 skipped.TASK.txt
RUN/nan.json        where a loss was not a number: the step, and what was in its batch; of several processes nan.RANK.json
RUN/lock            held while a process works here
RUN/last/, best/    model.safetensors      everything learned so far, under our module names; EMA where there is one; `seen`
                    optimizer.safetensors  AdamW's moments, and the raw weights of what has an EMA
                    state.json             step, best loss, modules, git commit

Checkpoints hold whole tensors, however many processes there were: any number of them goes on. The first of them writes.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from unifashion import UserError, lora, parallel, seen, sheets
from unifashion.config import UniFashionConfig
from unifashion.data import read_json
from unifashion.model import UniFashion
from unifashion.training import EMA

# What a run that goes on may be asked for anew; all else must be as it was. With other --steps, align's schedule is another
# from there on.
MAY_CHANGE = (
    "out",
    "resume",
    "init",
    "weights",
    "device",
    "compile",
    "workers",
    "shard",
    "allow_missing",
    "eval_every",
    "steps",
    "task_steps",
    "epochs",
)


def check_out(out: Path, resume: bool) -> None:
    """Raise UserError unless a run can start in `out`, or go on there: worth asking before gigabytes are read."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out wants a folder")
    if resume and not (out / "config.json").is_file():
        raise UserError(f"nothing to resume: {out} holds no run")
    begun = {p.name for p in out.iterdir()} if out.exists() else set()
    begun -= {"config.json.new", "lock"}  # killed at once
    if not resume and begun:
        raise UserError(f"{out} is not empty: say --resume to go on with it, or name another --out")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{out} cannot be made: {there} is not a folder that can be written")
    if resume:  # before gigabytes are read beside those of the run that works there
        lock(out)


_locks: dict[Path, object] = {}  # files that stay open for as long as the process lives


def lock(out: Path) -> None:
    """Raise UserError if another run works in `out`. The lock goes with the process, however it ends."""
    error = None
    out.mkdir(parents=True, exist_ok=True)
    if parallel.rank() == 0 and out.resolve() not in _locks:
        file = open(out / "lock", "w")  # noqa: SIM115
        try:
            # Not flock: the processes that read pictures would hold it, too, for seconds after this one was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks[out.resolve()] = file
        except OSError as refused:
            file.close()
            error = UserError(f"{out} is in use by another process: name another --out")
            if refused.errno not in (errno.EACCES, errno.EAGAIN):
                error = UserError(
                    f"{out}/lock cannot be locked ({refused.strerror}): name an --out elsewhere"
                )
    parallel.barrier(error)


def previous_config(out: Path, resume: bool) -> dict:
    """config.json of the run that goes on, which says what need not be said again: --init and --steps."""
    return read_json(out / "config.json") if resume else {}


def start_run(out: Path, config: dict, resume: bool) -> None:
    """Write config.json, begin skipped*.txt anew. Raises UserError, before writing, where a run that goes on is asked for other than it began with."""
    check_out(out, resume)
    config = json.loads(json.dumps(config, default=str))
    if before := previous_config(out, resume):
        asked = before.keys() & config.keys() - set(MAY_CHANGE)
        if has_checkpoint(out):  # what it began from is in it
            asked |= {"init"} & before.keys() & config.keys()
        if before.get("stage") != config.get("stage"):  # then much else is another's, too
            asked = {"stage"}
        other = []
        for name in sorted(asked):
            if name == "company":  # files that a stage does not read may have come since
                before[name] = {
                    file: before[name][file] for file in before[name].keys() & config[name].keys()
                }
                config[name] = {file: config[name][file] for file in before[name]}
            if before[name] != config[name] and name != "samples":
                other.append(f"{name.replace('_', '-')} {before[name]}, not {config[name]}")
        if other:
            raise UserError(f"{out} was started with {'; '.join(other)}: repeat its flags")
        if "samples" in asked and before["samples"] != config["samples"]:
            raise UserError(
                f"{out} was started with {before['samples']} samples, now there are {config['samples']}"
            )
    done = _state_of(_intact(out / "last"))["step"] if has_checkpoint(out) else 0
    if done > config["steps"]:
        raise UserError(f"{out} has done {done} steps already, more than the {config['steps']} of --steps")
    parallel.barrier()  # all have looked before the first of them writes
    lock(out)
    if parallel.rank() == 0:
        for folder in (out / "last", out / "best"):
            if (found := _intact(folder)) != folder:
                os.replace(found, folder)
            for rest in (".new", ".old"):  # of what was killed
                shutil.rmtree(folder.with_name(folder.name + rest), ignore_errors=True)
        new = out / "config.json.new"
        new.write_text(json.dumps(config, indent=1))
        new.replace(out / "config.json")
        (out / "samples").mkdir(exist_ok=True)
        if done < config["steps"]:  # else nothing is read again
            for log in out.glob("skipped*.txt"):  # what was broken may have been mended
                log.unlink()
        _end_line(out / "metrics.jsonl")
    git_commit()  # that of the code which runs: it may change in the folder meanwhile
    parallel.barrier()


def model_file(path: Path) -> Path:
    """--init: a run folder stands for its last checkpoint."""
    for candidate in (path, _intact(path / "last") / "model.safetensors", path / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path} is neither a run folder nor a model.safetensors")


def part_of(name: str) -> str:
    """Of a tensor's name: its top-level module or parameter. What LoRA adds to the LLM is a part of its own, "lora"."""
    return "lora" if name.endswith((".lora_a", ".lora_b")) else name.split(".")[0]


def learned_state(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """The tensors of the named parts, under our names, and those that the model only carries."""
    own = {k: v for k, v in model.state_dict().items() if part_of(k) in modules}
    return own | getattr(model, "carried", {})


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    modules: list[str],
    optimizer: torch.optim.AdamW,
    parameters: dict[str, nn.Parameter],
    ema: EMA | None,
    state: dict,
) -> None:
    """Write `folder` whole or not at all: a killed run finds the one before. Raises UserError if the disk is full."""
    moments: dict[str, Tensor] = {}
    for name, p in parameters.items():
        moments |= {f"{name}:{k}": _kept(v) for k, v in optimizer.state.get(p, {}).items()}
    if ema is not None:
        moments |= {f"{name}:raw": _kept(p.detach()) for name, p in ema.parameters.items()}
        ema.swap()
    tensors = {k: _kept(v) for k, v in learned_state(model, modules).items()}
    if ema is not None:
        ema.swap()
        state = {**state, "averaged": ema.n}
    error = None
    if parallel.rank() == 0:
        try:
            _write(folder, tensors, moments, {**state, "modules": modules, "commit": git_commit()})
        except UserError as full:
            error = full
    parallel.barrier(error)


def _write(folder: Path, tensors: dict[str, Tensor], moments: dict[str, Tensor], state: dict) -> None:
    """Beside it first, then two renames: `_intact` knows what to do about a kill between them."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        save_file(tensors, new / "model.safetensors")
        save_file(moments, new / "optimizer.safetensors")
        (new / "state.json").write_text(json.dumps(state, indent=1))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(told in str(error) for told in ("No space left", "quota exceeded")):
            raise UserError(
                f"{folder} cannot be saved: the disk is full. What was saved before is whole"
            ) from None
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _kept(x: Tensor) -> Tensor:
    """What goes to a file: whole, and not changed by what comes next (EMA's swap). Only the first process keeps it."""
    x = parallel.whole(x).detach()
    return x.to("cpu", copy=True).contiguous() if parallel.rank() == 0 else x.new_empty(0)


def save_evaluated(
    out: Path,
    val: float,
    model: nn.Module,
    modules: list[str],
    optimizer: torch.optim.AdamW,
    parameters: dict[str, nn.Parameter],
    ema: EMA | None,
    state: dict,
) -> None:
    """After an evaluation: `last`, and `best` if `val` is the lowest so far; the log; then the curves."""
    log_line(out, step=state["step"] - 1, val=val)
    if not math.isfinite(val):
        raise UserError(diverged(out, "val", val, state["step"]))
    better = val < state["best"]
    if better:
        state["best"] = val
    if parallel.rank() == 0:
        tqdm.write(f"step {state['step']}: val {val:.4f}" + ", the best so far" * better, file=sys.stderr)
    for folder in (
        ("best", "last") if better else ("last",)
    ):  # `best` first: a kill between the two loses nothing
        save_checkpoint(out / folder, model, modules, optimizer, parameters, ema, state)
    if parallel.rank() == 0:
        sheets.draw_curves([out], out / "losses.png")


GRADIENT = "the gradient of "  # what a loss's name is preceded by in messages


class NaNWatch:
    """
    Remembers at which step a loss or a gradient's norm first was not finite, without waiting for the device at every step: `check`
    waits, where the losses are logged.
    """

    def __init__(self, out: Path, names: dict[str, list[str]], device: torch.device) -> None:
        """names {task: of each sample a name}"""
        self.out, self.names = out, names
        self.first = torch.full((), -1, dtype=torch.long, device=device)
        self.seen: list[tuple[int, str, dict[str, Tensor], Tensor]] = []

    def see(self, step: int, task: str, losses: dict[str, Tensor], norms: Tensor, index: Tensor) -> None:
        """norms (losses,): those of their gradients, which may overflow where a loss does not; index: of the samples"""
        losses = {name: x.detach() for name, x in losses.items()}
        losses |= {f"{GRADIENT}{name}": x for name, x in zip(losses, norms, strict=True)}
        bad = ~torch.stack([x.float() for x in losses.values()]).isfinite().all()
        self.first = torch.where((self.first < 0) & bad, len(self.seen), self.first)
        self.seen.append((step, task, losses, index))

    def check(self) -> None:
        """Raise UserError if a loss was not a number, and leave RUN/nan.json: the checkpoints are from before that."""
        first, of_loss, of_gradient = int(self.first), None, None
        if first >= 0:
            step, task, losses, index = self.seen[first]
            values = {name: float(x) for name, x in losses.items()}
            told = {"step": step, "task": task, "losses": {k: str(v) for k, v in values.items()}}
            told["samples"] = [self.names[task][i] for i in index.tolist()]
            name = "nan.json" if parallel.world() == 1 else f"nan.{parallel.rank()}.json"
            (self.out / name).write_text(json.dumps(told, indent=1))
            bad = next(k for k, v in values.items() if not math.isfinite(v))
            error = UserError(diverged(self.out, bad, values[bad], step) + f"; {name} has its samples")
            of_loss, of_gradient = (None, error) if bad.startswith(GRADIENT) else (error, None)
        # The process whose loss it was speaks first: by the average, the gradients of all are no numbers then.
        parallel.barrier(of_loss)
        parallel.barrier(of_gradient)
        self.seen.clear()


def diverged(out: Path, name: str, value: float, step: int) -> str:
    before = f"; {out}/last is from before, from which --init may go on in another --out" * has_checkpoint(
        out
    )
    return f"{name} is {value} at step {step}: the run diverged{before}. A lower --lr may help"


def has_checkpoint(out: Path) -> bool:
    return _intact(out / "last").exists()


def _intact(folder: Path) -> Path:
    """A checkpoint, or the one before it where a run was killed between the two renames that replace it."""
    old = folder.with_name(folder.name + ".old")
    return old if old.exists() and not folder.exists() else folder


def _state_of(folder: Path) -> dict:
    return read_json(folder / "state.json")


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    parameters: dict[str, nn.Parameter],
    ema: EMA | None,
) -> dict:
    """Put everything back where `save_checkpoint` found it. -> its state."""
    # A run that was killed after it saved `best` and before `last` has that best already; one whose best/ is gone has none.
    best = folder.with_name("best")
    lowest = {"best": _state_of(best)["best"] if best.exists() else math.inf}
    if not folder.exists():
        return lowest  # killed before its first checkpoint: from the start
    state = {**_state_of(folder), **lowest}
    load_learned(model, folder / "model.safetensors")
    try:
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/optimizer.safetensors: not a whole safetensors file ({error})") from None
    for name, p in parameters.items():
        if ema is not None and name in ema.parameters:
            ema.average[name].copy_(p.data)
            if f"{name}:raw" not in moments:
                raise UserError(f"{folder}/optimizer.safetensors lacks {name}:raw")
            p.data.copy_(parallel.like(moments.pop(f"{name}:raw"), p.data))
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{k}" in moments]
        if keys:
            held = {k: moments.pop(f"{name}:{k}") for k in keys}
            home = p.device if optimizer.defaults["fused"] else "cpu"  # of the count of steps
            optimizer.state[p] = {
                k: v.to(home) if k == "step" else parallel.like(v, p.data) for k, v in held.items()
            }
    if moments:
        raise UserError(f"{folder}: {next(iter(moments))} belongs to no trained parameter")
    if ema is not None:
        ema.n = state["averaged"]
    return state


def load_learned(model: nn.Module, path: Path) -> list[str]:
    """
    Load a `model.safetensors`: each part is in it wholly or not at all. -> the parts found.

    Those of the half that a `UniFashion` was built without go into its `carried`, with the record of what was trained on
    (`seen`), which is no part: from there they go into what it saves.
    """
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for a truncated file
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    tensors, record = seen.apart(tensors, path)
    own = model.state_dict()
    here = {part_of(k) for k in own}
    if isinstance(model, UniFashion) and any(part_of(k) not in here for k in tensors):
        own |= {k: v for k, v in _whole(model.cfg).items() if part_of(k) not in {*here, "llama"}}
    parts = {part_of(k) for k in tensors}
    wanted = [k for k in own if part_of(k) in parts]
    for k, v in tensors.items():
        if k not in own:
            raise UserError(f"{path}: {k} is not a tensor of this preset's model")
        if own[k].shape != v.shape:
            raise UserError(
                f"{path}: {k} has shape {tuple(v.shape)}, this preset wants {tuple(own[k].shape)}"
            )
        if not v.isfinite().all():
            raise UserError(f"{path}: {k} is not finite: the run that wrote it diverged")
    missing = sorted(set(wanted) - tensors.keys())
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing")
    with torch.no_grad():
        for k, v in tensors.items():
            if part_of(k) in here:
                own[k].copy_(parallel.like(v, own[k]))
    if isinstance(model, UniFashion):
        record = record or {seen.UNKNOWN: seen.nothing()}
        model.carried = {k: v for k, v in tensors.items() if part_of(k) not in here} | record
    return sorted(parts & here)


def _whole(cfg: UniFashionConfig) -> dict[str, Tensor]:
    """Names and shapes of all that a model may have."""
    with torch.device("meta"):
        model = UniFashion(cfg, draws=True, writes=True)
        lora.inject(model.llama, cfg.lora)
    return model.state_dict()


@cache
def git_commit() -> str:
    def git(*command: str) -> str:
        where = ["git", "-C", str(Path(__file__).parent.parent)]
        return subprocess.run([*where, *command], capture_output=True, text=True).stdout.strip()

    try:
        commit = git("describe", "--always", "--dirty")
        new = git("ls-files", "--others", "--exclude-standard", "*.py")  # which `describe` does not look at
    except OSError:  # no git here: the code came as an archive
        return "unknown"
    return commit + "-dirty" * (bool(new) and not commit.endswith("-dirty")) or "unknown"


def _end_line(file: Path) -> None:
    """What a killed run cut short stays a line of its own."""
    if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
        with open(file, "a") as f:
            f.write("\n")


def log_line(run: Path, **values: float | int | str) -> None:
    if parallel.rank() > 0:
        return
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(values) + "\n")
