"""The miniature's order of work, what a stop or a kill leaves of it, and what its tables and claims say of known figures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train_phase1
import train_phase2
from eval import jobs, judge, miniature
from eval import miniature_tables as tables
from train_phase2 import PARTS, TASKS
from unifashion import UserError
from unifashion.data import toy

ROOT = Path(__file__).parent.parent


def namespace(out, jobs=2, seeds=(0,)):
    return Namespace(
        out=out, jobs=jobs, seeds=seeds, quiet=True, device="cpu", dtype="fp32", world="w", search="s"
    )


def test_the_variants_are_table_5s():
    """Each row has what the row above has, and one thing more; a part of Eq. 13 that is in, is in to the end."""
    tasks, without = zip(*miniature.VARIANTS.values(), strict=True)
    assert [set(t) for t in tasks] == [
        {"retrieval", "cir"}, *3 * [{"retrieval", "cir", "caption"}], set(TASKS)
    ]  # fmt: skip
    left_out = [set(filter(None, w.split(","))) for w in without]
    assert left_out == [set(PARTS), {"q2i", "caption"}, {"q2i"}, set(), set()]


def test_every_job_comes_after_what_it_needs():
    needed = miniature.jobs_of(1)
    order = list(needed)
    assert all(order.index(need) < order.index(job) for job, needs in needed.items() for need in needs)
    assert needed["seed1/diff/measure"] == ["seed1/diff", "seed1/annotate"]
    variants = [job for job in order if job.count("/") == 1][4:]
    assert variants == [f"seed1/{name}" for name in reversed(miniature.VARIANTS)]  # the longest first
    assert not set(needed) & set(miniature.jobs_of(2))  # seeds share nothing


def carried_out(tmp_path, monkeypatch, program="", **settings):
    """All jobs as processes that write their name to a file after running `program`."""
    log = tmp_path / "order"

    def start(job, place, args):
        code = f"job={job!r}\n{program}\nopen({str(log)!r},'a').write(job+chr(10))"
        return subprocess.Popen([sys.executable, "-c", code])

    monkeypatch.setattr(miniature, "start", start)
    monkeypatch.setattr(miniature.time, "sleep", lambda _: None)
    miniature.carry_out(namespace(tmp_path, **settings))
    return log.read_text().split()


def test_all_jobs_are_done_once_each_after_its_needs(tmp_path, monkeypatch):
    order = carried_out(tmp_path, monkeypatch)
    needs = miniature.jobs_of(0)
    assert sorted(order) == sorted(needs)
    assert all(order.index(need) < order.index(job) for job in needs for need in needs[job])
    carried_out(tmp_path, monkeypatch)  # nothing is left to do
    assert (tmp_path / "order").read_text().split() == order


def test_what_the_paper_has_not_is_done_when_all_seeds_have_its_rows(tmp_path, monkeypatch):
    order = carried_out(tmp_path, monkeypatch, seeds=(0, 1), jobs=1)
    assert {job.split("/")[1] for job in order[-4:]} == {"q2i"}
    assert sorted(order) == sorted([*miniature.jobs_of(0), *miniature.jobs_of(1)])


def test_the_time_that_a_job_took_is_its_own_not_others(tmp_path, monkeypatch):
    """On a machine where others are at work, too, a job's wall time says little."""
    program = "import time\nwhile job.endswith('/align') and time.process_time() < 1.6: pass\n"
    carried_out(tmp_path, monkeypatch, program + "if job.endswith('/caption'): time.sleep(1.6)")
    took = {row["job"]: row for row in jobs.noted(tmp_path)}
    assert took["seed0/align"]["cpu seconds"] in (2, 3) and took["seed0/caption"]["cpu seconds"] < 2
    assert took["seed0/caption"]["seconds"] >= 2


def test_a_job_that_fails_stops_all_and_is_tried_again(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="seed0/caption failed: .*seed0/caption.log tells why"):
        carried_out(tmp_path, monkeypatch, program="if job.endswith('caption'): exit(1)")
    assert (tmp_path / "order").read_text().split() == ["seed0/align"]
    order = carried_out(tmp_path, monkeypatch)
    assert order[:2] == ["seed0/align", "seed0/caption"] and len(order) == len(miniature.jobs_of(0))


@pytest.mark.parametrize(("sign", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_stop_ends_the_jobs_that_run_and_counts_them_as_not_done(sign, error, tmp_path, monkeypatch):
    ticks, before = iter(range(10**6)), signal.getsignal(signal.SIGTERM)

    def interrupted(_):
        if next(ticks) > 3:
            signal.raise_signal(signal.Signals[sign])

    monkeypatch.setattr(miniature.time, "sleep", interrupted)
    monkeypatch.setattr(
        miniature, "start", lambda *_: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    )
    # A test before this one may have left either to the system, which would end pytest.
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            miniature.carry_out(namespace(tmp_path))
    finally:
        signal.signal(signal.SIGINT, was)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["job"] for row in jobs.noted(tmp_path)] == ["seed0/align"]
    assert not jobs.is_done(tmp_path, "seed0/align")


def test_there_are_no_more_jobs_at_a_time_than_cores_and_each_has_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2, 7, 5})
    assert jobs.places_of(2) == [[1, 2], [3, 5]] and jobs.places_of(1) == [[1, 2, 3, 5, 7]]
    assert jobs.places_of(9) == [[1], [2], [3], [5], [7]]


ORPHAN = """
import os, sys, time
from pathlib import Path
from eval import jobs
with jobs.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        jobs.end_with_parent()
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
def test_the_jobs_of_a_killed_parent_end_and_hold_the_lock_until_then(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "seed0")], stdout=subprocess.PIPE, cwd=ROOT
    )
    child = int(parent.stdout.readline())
    with pytest.raises(UserError, match="seed0 is in use"), jobs.locked(tmp_path / "seed0"):
        pass
    os.kill(child, signal.SIGSTOP)  # it is about to end, but has not
    while (
        Path(f"/proc/{child}/stat").read_text().split()[2] != "T"
    ):  # on a busy machine the signal waits for its turn
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    with pytest.raises(UserError, match="seed0 is in use"), jobs.locked(tmp_path / "seed0"):
        pass
    os.kill(child, signal.SIGCONT)
    assert parent.stdout.read() == b""  # which waits for the child's end
    with jobs.locked(tmp_path / "seed0"):
        pass


def test_a_folder_that_was_begun_with_other_settings_is_refused(tmp_path, monkeypatch):
    args = namespace(tmp_path)
    for name in ("world", "search"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "toy.json").write_text(json.dumps({"seed": 0}))
        setattr(args, name, folder)
    miniature.agree(args)
    (tmp_path / "seed0/align").mkdir(parents=True)
    before = (tmp_path / "settings.json").read_text()
    miniature.agree(args)
    half = Namespace(**vars(args) | {"dtype": "bf16"})
    with pytest.raises(UserError, match="was begun with seed0 in float32, not bfloat16: ask for the same"):
        miniature.agree(half)
    monkeypatch.setitem(miniature.STEPS, "align", 7)
    with pytest.raises(UserError, match="begun with steps of phase 1 {'align': 600, .*, not {'align': 7"):
        miniature.agree(args)
    monkeypatch.undo()
    (tmp_path / "search/toy.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(UserError, match="begun with searched {'seed': 0}, not {'seed': 1}"):
        miniature.agree(args)
    assert (tmp_path / "settings.json").read_text() == before
    (tmp_path / "search/toy.json").write_text(json.dumps({"seed": 0}))
    half.seeds = (1,)  # another seed may be of another dtype
    miniature.agree(half)
    dtypes = {"dtypes of training": {"seed0": "float32", "seed1": "bfloat16"}}
    assert json.loads((tmp_path / "settings.json").read_text()) == json.loads(before) | dtypes
    half.seeds, half.dtype = (1, 2), "fp32"  # nothing of seed 1 is there yet
    miniature.agree(half)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["dtypes of training"] == {"seed0": "float32", "seed1": "float32", "seed2": "float32"}
    (tmp_path / "settings.json").write_text(
        json.dumps(settings | {"dtype": "bfloat16"})
    )  # of an earlier form
    with pytest.raises(UserError, match="was begun with dtype bfloat16, not None"):
        miniature.agree(half)


@pytest.mark.parametrize(
    ("device", "has", "dtype"),
    [
        ("cuda", {}, "bf16"),
        ("cpu", {"avx512_bf16": True}, "bf16"),
        ("cpu", {"amx_bf16": True}, "bf16"),
        ("cpu", {"avx512_bf16": False, "avx2": True}, "fp32"),
        ("cpu", {}, "fp32"),
    ],
)
def test_bfloat16_is_for_devices_that_are_made_for_it(device, has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert jobs.quick_dtype(torch.device(device)) == dtype


def test_a_line_that_a_kill_cut_short_is_no_job_that_is_done(tmp_path):
    row = {"job": "seed0/align", "code": 0, "seconds": 3, "cores": 1}
    jobs.note(tmp_path, row)
    with open(tmp_path / "jobs.jsonl", "a") as file:
        file.write(json.dumps(row | {"job": "seed0/caption"})[:30])
    assert jobs.noted(tmp_path) == [row]
    assert jobs.is_done(tmp_path, "seed0/align") and not jobs.is_done(tmp_path, "seed0/caption")


@pytest.mark.parametrize(
    "flags", ["--jobs -1", "--seeds 0 0", "--seeds -1", "--seeds 0 1 2 3 4 5 6 7 8 9 10"]
)
def test_wrong_input_is_refused_before_any_work(flags):
    with pytest.raises(UserError, match="^--(jobs|seeds) must be 0 or more"):
        miniature.parse(["--data", "toy", *flags.split()])


def test_the_report_says_how_it_came_about(tmp_path, results):
    """Not where and with what flags it was told, but what was asked for and where the work was done."""
    args = miniature.parse(["--data", "toy=w", "--out", str(tmp_path), "--jobs", "0", "--dtype", "bf16"])
    rows = [
        {"job": "seed0/align", "code": -15, "seconds": 1800, "cores": 2, "device": "cpu", "machine": "one"},
        {
            "job": "seed0/align",
            "code": 0,
            "seconds": 9000,
            "cpu seconds": 3600,
            "cores": 1,
            "device": "cpu",
            "machine": "one",
        },
        {"job": "seed1/diff", "code": 0, "seconds": 7200, "cores": 8, "device": "cuda", "machine": "two"},
        {"job": "seed7/diff", "code": 0, "seconds": 7200, "cores": 8, "device": "cuda", "machine": "three"},
    ]
    for row in rows:
        jobs.note(tmp_path, row)
    state = tmp_path / "seed0/base/last/state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"commit": "b"}')
    told = miniature.about(args, results)
    assert told["command"] == "`python -m eval.miniature --data toy=w --dtype bf16`"
    assert "align 600" in told["steps"]
    (tmp_path / "settings.json").write_text(
        '{"steps of phase 1": {"align": 7}, "steps of phase 2": {"cir": 9}}'
    )
    assert miniature.about(args, results)["steps"] == "phase 1: align 7; phase 2: cir 9"
    asked = {"dtypes of training": {"seed0": "bfloat16", "seed1": "float32"}}
    assert miniature.commands_of(args, (0, 1), asked) == [
        f"python -m eval.miniature --data toy=w --dtype {dtype} --seeds {seed}"
        for seed, dtype in enumerate(("bf16", "fp32"))
    ]
    held = "1.0 hours of held cores, whatever else ran on them"
    assert told["time"].startswith(
        f"1.0 hours of CPU time and {held} and 2.0 hours of jobs on the GPU, in 2 jobs; "
    )
    assert told["machine"] == "one; two" and told["commit"] == "a, b"
    assert told["verdict of the leak guard"] == "clean"
    assert told["seeds"].startswith("0, 1, 2; not yet measured: seed0/generate, seed0/q2i, seed1/generate")
    results[1]["llm"]["composed"]["verdict"] = "unknown: why"
    told = miniature.about(args, results)["verdict of the leak guard"]
    assert told.endswith(". unknown: why (seed1/llm)") and told.startswith("clean (seed0/base, seed0/llm,")


def test_a_run_that_was_stopped_is_not_done(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"steps": 10}))
    (tmp_path / "last" / "state.json").write_text(json.dumps({"step": 10}))
    miniature.check_ended(tmp_path)
    (tmp_path / "last" / "state.json").write_text(json.dumps({"step": 9}))
    with pytest.raises(UserError, match="stopped after 9 of 10 steps"):
        miniature.check_ended(tmp_path)


# What is told


def run_of(cmr, plain, captions, bleu=30.0, true=90.0, frechet=None):
    def f(x):
        return [x, x - 1, x + 1]

    rows = {"composed": [f(captions)] * 3, "without captions": [f(plain)] * 3}
    texts = ("captions", "of other pictures", "the truth, anew")
    style = {
        "own": {row: {"BLEU-4": f(bleu), "METEOR": None} for row in texts},
        "attributes": {row: {"all": {"precision": f(true), "coverage": f(true)}} for row in texts},
    }
    of = {
        "retrieval": {"figures": {"ours": {k: f(cmr) for k in (*tables.WAYS, "mean")}}},
        "composed": {"recall": {row: {"mean": v} for row, v in rows.items()}},
        "captioning": {"results": {"fashiongen": style}},
    }
    if frechet is not None:
        of["generation"] = {
            "results": {
                "cloth": {"rows": {"output": {"Frechet (judge)": 0.0}}},
                "sketch+text": {
                    "rows": {"output": {"Frechet (judge)": frechet, "attributes": [60.0, 59, 61]}}
                },
            }
        }
    return {name: {"commit": "a", "verdict": "clean", **report} for name, report in of.items()}


@pytest.fixture
def results():
    """Three seeds, in which the LLM adds 2 ± 1, the diffusion side 5 ± .1, and search by text is what it was, give or take."""
    return {
        seed: {
            "base": run_of(80 + seed, 60 + seed, 60 + seed),
            "llm": run_of(80 - seed, 60 + 2 * seed + 1, 61 + 2 * seed, bleu=30.0),
            "llm-cap": run_of(80, 60, 70, bleu=30.0),
            "diff": run_of(80.5, 61, 75 + seed / 10, bleu=29 - seed / 10, frechet=12.0),
        }
        for seed in range(3)
    }


def test_a_cell_is_the_mean_over_seeds_and_their_standard_deviation(results):
    values = tables.over_seeds(results, "base", tables.searched("ours", "mean"))
    assert values == [80, 81, 82] and tables.cell(values) == "81.0 ± 1.0"
    assert tables.cell([]) == "-" and tables.cell([3.25]) == "3.2"
    line = next(row for row in tables.table5(results).splitlines() if row.startswith("| Base |"))
    assert line == "| Base | 81.0 ± 1.0 | 61.0 ± 1.0 | 61.0 ± 1.0 | 30.0 ± 0.0 | 90.0 ± 0.0 | - | - |"


def test_a_claim_is_decided_by_the_interval_over_seeds(results):
    rows = [line.strip("| ").split(" | ") for line in tables.claim_table(results).splitlines()[2:]]
    told = {said: [difference, here] for said, difference, here in rows}
    helps = [v for k, v in told.items() if "diffusion model (Eq. 12" in k]
    assert helps == [["+5.1 [+4.9, +5.3]", "supported"]]  # 5, 5.1, 5.2: 4.30 * .1 / sqrt(3) either way
    costs = [v for k, v in told.items() if "diffusion model costs" in k]
    assert costs == [["-1.1 [-1.3, -0.9]", "supported"]]
    unsure = [v for k, v in told.items() if "(Eq. 11, ITG" in k]
    assert unsure == [["+2.0 [-0.5, +4.5]", "not decided"]]  # 1, 2, 3
    assert [v[1] for k, v in told.items() if "Search by text" in k] == ["not decided"]


def test_what_a_claim_expects_decides_what_a_difference_says_of_it():
    for sign, more, less in ((1, "supported", "contradicted"), (-1, "contradicted", "supported")):
        assert tables.judged([1, 1.1, 1.2], sign) == ["+1.1 [+0.9, +1.3]", more]
        assert tables.judged([-1, -1.1, -1.2], sign) == ["-1.1 [-1.3, -0.9]", less]
        assert tables.judged([-1, 0, 1], sign)[1] == "not decided"
    for sign in (1, -1):  # of no difference: by a margin of one point
        assert tables.judged([sign * x for x in (1.9, 2, 2.1)], 0)[1] == "contradicted"
        assert tables.judged([sign * x for x in (0.5, 0.6, 0.7)], 0)[1] == "supported"
        assert tables.judged([sign * x for x in (0.9, 1, 1.1)], 0)[1] == "not decided"
        assert tables.judged([sign * x for x in (-1, 0, 1)], 0)[1] == "not decided"


def test_one_seed_decides_nothing(results):
    del results[1], results[2]
    assert tables.claim_table(results).count("not decided: fewer than two seeds") == len(tables.claims())


def test_meteor_that_is_not_there_is_not_measured(results):
    assert "| UniFashion | 28.9 ± 0.1 | not measured |" in tables.table2(results)


def test_a_variant_that_is_missing_leaves_its_cells_empty(results):
    for runs in results.values():
        del runs["llm"]
    assert "| Base+LLM | - | - | - | - | - | - | - |" in tables.table5(results)


def test_students_t():
    """Against its own definition: the 97.5 % point of the mean of n normal numbers over its estimated error."""
    import numpy as np

    rng = np.random.default_rng(0)
    for n, t in tables.T95.items():
        x = rng.standard_normal((400_000, n))
        ratio = np.abs(x.mean(1)) / (x.std(1, ddof=1) / n**0.5)
        assert (ratio < t).mean() == pytest.approx(0.95, abs=0.002)


def test_table_5_has_the_figure_of_design_as_the_papers(results):
    """Its 12.43 is Table 3's of design; of try-on that is 8.42."""
    line = next(row for row in tables.table5(results).splitlines() if "diff." in row)
    assert line.endswith("| 12.0 ± 0.0 | 60.0 ± 0.0 |")
    assert tables.table5({}).splitlines()[0].endswith("| FIG: Fréchet, design | FIG: true attributes % |")


def test_the_document_tells_what_was_kept(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = miniature.parse(["--data", "toy", "--jobs", "0", "--out", "docs/miniature"])
    results = miniature.results_of(args.out, args.seeds)
    pictures = {seed: f"../docs/miniature/seed{seed}/diff/drawn.png" for seed in results}
    told = tables.report(results, miniature.about(args, results), pictures)
    assert told == Path("eval/miniature.md").read_text()
    assert all((ROOT / "eval" / picture).is_file() for picture in pictures.values())


def test_the_report_is_kept_though_nobody_reads_what_is_printed(tmp_path):
    flags = ["--data", "toy", "--jobs", "0", "--out", "docs/miniature", "--report", str(tmp_path / "it.md")]
    command = [sys.executable, "-u", "-m", "eval.miniature", *flags]
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    reading.stdout.close()
    assert (reading.stderr.read(), reading.wait()) == (b"", 141)
    assert (tmp_path / "it.md").read_text().startswith("# The paper in miniature")


@pytest.mark.slow
def test_a_seed_from_nothing_to_its_tables(tmp_path, monkeypatch, capsys):
    """Every job of a seed, each with a step or two: what one leaves the next can use, and the tables find all figures."""
    monkeypatch.chdir(tmp_path)
    toy.ensure(tmp_path / "toy", train=24, val=4, test=8, workers=1, quiet=True)
    toy.ensure(tmp_path / "search", seed=1, train=0, val=0, test=16, workers=1, quiet=True)
    monkeypatch.setattr(miniature, "STEPS", dict.fromkeys(miniature.STEPS, 1))
    monkeypatch.setattr(miniature, "TASK_STEPS", dict.fromkeys(miniature.TASK_STEPS, 1))
    monkeypatch.setattr(judge, "STEPS", 2)
    for module in (train_phase1, train_phase2):
        tiny = {part: {**of, "batch_size": 4} for part, of in module.DEFAULTS["tiny"].items()}
        monkeypatch.setitem(module.DEFAULTS, "tiny", tiny)
    flags = ["--data", "toy=toy", "--search", "search", "--out", "out", "--seeds", "0"]
    for job in miniature.jobs_of(0):
        miniature.main([*flags, "--job", job])
        jobs.note(tmp_path / "out", {"job": job, "code": 0, "seconds": 1, "cores": 1})
    capsys.readouterr()
    miniature.main([*flags, "--jobs", "0"])
    told = capsys.readouterr().out
    assert told == (tmp_path / "out/miniature.md").read_text() + "\n"
    line = {row.split(" | ")[0].strip("| "): row for row in told.splitlines() if row.startswith("| ")}
    for name in ("UniFashion w/o cap", "UniFashion w/o img", "try-on: UniFashion", "of other pictures"):
        assert len(re.findall(r"\| [\d.-]+", line[name])) >= 3, line[name]
    assert line["Base"].endswith("| - |") and not line["Base+LLM+diff."].endswith("| - |")
    assert told.count("fewer than two seeds") == len(tables.claims())

    captions = list(map(json.loads, Path("out/seed0/searched.jsonl").read_text().splitlines()))
    assert len(captions) == len(list((tmp_path / "search/fashioniq/images").iterdir()))
    assert all(set(row) >= {"image", "caption", "sha256"} for row in captions)
