"""eval/speed.py and what it times: the peers do the same work, and what is printed is what was measured. No time is asserted."""

import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from eval import peers, search_speed, speed, timing, workloads
from eval.sizes import SIZES
from eval.timing import Ceilings, Round
from eval.workloads import Place, Workload, count
from unifashion import UserError, cpu, fast
from unifashion.config import FULL, TINY
from unifashion.garment import GarmentEncoder
from unifashion.llama import Llama
from unifashion.model import UniFashion
from unifashion.stableviton import PUBLISHED, StableVITON
from unifashion.unet import UNet
from unifashion.vae import VAE
from weights.rename import blank

CPU = torch.device("cpu")
HERE = Place(CPU, torch.float32, compiles=False)
TWO = r" +(\S+) +(\S+)"


@pytest.mark.slow
def test_every_workload_is_printed_beside_its_peer(capsys: pytest.CaptureFixture):
    speed.main(["--size", "tiny", "--repeats", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"{torch.get_num_threads()} threads" in out and torch.__version__ in out and "tiny size" in out
    for name, peer in {
        "step": "diffusers",
        "try-on, PLMS 3, 1": "diffusers",
        "try-on, DPM++ 2, 2": "diffusers",
        "decode": "diffusers",
        "write, 3": "transformers",
        "embed, 2": "transformers",
        "search, 500": "product",
        "train the U-Net, 2": "diffusers",
        "train LoRA, 2 x 12": "transformers and peft",
    }.items():
        assert re.search(rf"^{re.escape(name)} +ours {TWO} +\d+\.\d\d ", out, re.MULTILINE), name
        assert re.search(rf"^{re.escape(name)} +{peer} {TWO} +1\.00 ", out, re.MULTILINE), name
    for name in ("step, with the garment", "try-on, with the garment, PLMS 3, 2"):
        assert re.search(rf"^{name} +ours {TWO} +- ", out, re.MULTILINE)
    assert (
        "a straight line to" in out and len(re.findall(r"% +\S+ +\d\.\d{3}$", out, re.MULTILINE)) == 4
    )  # GiB


@pytest.mark.slow
@torch.no_grad()
def test_compiled_ours_and_peers_do_the_same_and_only_they_are_compiled(monkeypatch, tmp_path):
    """By a backend that runs what was traced: it counts the graphs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    real, counter, how_asked = torch.compile, CompileCounter(), []

    def compile_(f, mode=None, **how):
        how_asked.append(how)
        return real(f, backend=counter, **how)

    monkeypatch.setattr(torch, "compile", compile_)
    compiles = HERE._replace(compiles=True)
    for works in (workloads.steps, workloads.tryons, workloads.decodings, workloads.writings):
        going_on = works(SIZES["tiny"], compiles)  # with its folder
        work, results = next(going_on), {}
        for who, call in work.calls.items():
            before = counter.frame_count
            with speed.settings(who):
                results[who] = call()
            assert (counter.frame_count > before) is ("compiled" in who), (work.name, who)
        assert torch.allclose(results["ours"], results["ours, compiled"], atol=1e-4), work.name
        torch._dynamo.reset()
    assert any(how.get("fullgraph") for how in how_asked)  # the peers': a pipeline's graph has no breaks


def test_a_row_has_medians_the_ratio_of_rounds_and_the_share_of_the_floor(monkeypatch):
    rounds = {
        "ours": [Round(9.0, 5.0), Round(3.0, 4.0), Round(1.0, 6.0)],
        "diffusers": [Round(18.0, 4.0), Round(1.0, 4.0), Round(3.0, 7.0)],
    }
    monkeypatch.setattr(speed, "measure", lambda *args: rounds)
    work = Workload("draw", 2, 300, 40, dict.fromkeys(rounds))
    lines = speed.rows(work, HERE, Ceilings(200.0, 80.0), 3).splitlines()
    assert lines[0].split() == ["draw", "ours", "3", "1.5", "2.00", "1.5", "50%", "5"]
    assert lines[1].split() == ["draw", "diffusers", "3", "1.5", "1.00", "1.5", "50%", "4"]
    assert speed.rows(work, HERE, Ceilings(1e9, 80.0), 3).split()[5:7] == ["0.5", "17%"]


def test_calls_take_turns_each_in_its_context_and_the_first_round_is_not_timed():
    calls, within = [], []
    steps = {name: lambda name=name: (calls.append(name), torch.ones(1))[1] for name in "ab"}
    rounds = timing.measure(steps, 3, CPU, lambda name: (within.append(name), nullcontext())[1])
    assert calls == within == list("ab" * 4)
    assert [len(times) for times in rounds.values()] == [3, 3]


def test_numbers_that_are_not_finite_are_not_timed():
    with pytest.raises(RuntimeError, match="not finite"):
        timing.measure({"a": lambda: torch.tensor(float("nan"))}, 1, CPU, lambda name: nullcontext())


# The peers do the same work


@torch.no_grad()
def test_ours_and_diffusers_predict_and_decode_the_same():
    """Filled with the same pattern: what is not the same is not the same network."""
    torch.manual_seed(0)
    for works in (workloads.steps, workloads.decodings):
        work = next(works(SIZES["tiny"], HERE))
        ours, *theirs = (call() for call in work.calls.values())
        assert len(theirs) == 2 and ours.std() > 1e-4
        for other in theirs:
            assert torch.allclose(ours, other, atol=1e-5 * float(ours.abs().max())), work.name


@torch.no_grad()
def test_both_write_the_same_tokens_all_that_are_timed():
    for work in workloads.writings(SIZES["tiny"], HERE):
        ours, *theirs = (call() for call in work.calls.values())
        assert ours.numel() == work.n and len(theirs) == 2
        assert all(torch.equal(ours, other) for other in theirs)


def test_both_learn_from_the_same_loss():
    for work in workloads.trainings(SIZES["tiny"], HERE):
        ours, theirs = (call() for call in work.calls.values())
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)
        held = [sum(x.numel() for x in tensors) for tensors in work.held.values()]
        assert held[0] == pytest.approx(held[1], rel=0.01)


def test_peers_are_as_large_as_ours_at_full_size():
    cfg, plain = FULL, SIZES["full"].plain
    with torch.device("meta"):
        for ours, theirs in (
            (lambda: UNet(cfg.unet), lambda: peers.unet(cfg.unet)),
            (lambda: VAE(cfg.vae), lambda: peers.vae(cfg.vae)),
            (lambda: Llama(cfg.llama), lambda: peers.llama(cfg.llama)),
        ):
            assert parameters(ours()) == parameters(theirs())
        model = StableVITON(plain)
        encoder = parameters(peers.image_encoder(plain))
        assert encoder == parameters(model.image) + parameters(model.exemplar) + model.null_context.numel()
        whole, blip2 = UniFashion(cfg, draws=False), peers.blip2(cfg.vit, cfg.qformer)
    heads = parameters(whole.qformer.cls) if hasattr(whole.qformer, "cls") else 0
    assert abs(parameters(whole) - heads - parameters(blip2)) < 0.03 * parameters(blip2)
    assert plain == PUBLISHED["paint-by-example"] and SIZES["full"].dressed == PUBLISHED["stableviton"]


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_at_full_size_a_step_is_what_others_count_and_the_garment_nearly_doubles_it():
    """1.154 TFLOP by diffusers, with guidance and 32 tokens of context."""
    full = SIZES["full"]
    alone = workloads.step_flops(full.plain, 2)
    assert 1.15e12 < alone < 1.16e12  # fewer: no keys and values of the context at every step
    assert 1.8 < workloads.step_flops(full.dressed, 2) / alone < 1.9
    net = blank(lambda: peers.unet(full.plain.unet))
    x, t, context, _ = workloads.a_call(Place(torch.device("meta"), torch.float32, False), full.plain, 2)
    assert alone < count(lambda: net(x, t, context)) < 1.01 * alone


# How it is timed


def test_peers_run_as_they_come_and_what_is_not_called_compiled_is_not(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    cpu.float32_where_faster(CPU, torch.bfloat16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    told = F.conv2d, F.linear
    function = torch.compile(lambda x: x + 1, backend=backend)
    for name, compiles in (("diffusers", 0), ("ours", 0), ("ours, compiled", 1), ("diffusers, compiled", 1)):
        with speed.settings(name):
            assert ((F.conv2d, F.linear) == told) is name.startswith("ours")
            assert (F.conv2d is cpu.CONV) is name.startswith("diffusers")
            function(torch.ones(1))
        assert len(graphs) == compiles
    recorded = fast.Recorded(torch.neg)
    with speed.settings("ours"):
        assert recorded(torch.ones(1)) == -1 and not recorded.graphs
    assert (F.conv2d, F.linear) == told


def test_the_most_that_is_held_is_the_peak_of_a_call():
    kept = [torch.ones(1000)]
    assert speed.peak(lambda: (torch.ones(500) + 1) * 2, kept, CPU) == 4 * 2000  # with two of 500


def test_straightness_is_the_distance_from_the_best_line():
    assert speed.straightness((1, 2, 4), [1.5, 2.5, 4.5]) == pytest.approx(0, abs=1e-9)
    assert 0.1 < speed.straightness((1, 2, 4), [1.0, 3.0, 4.0]) < 0.3


def test_the_shipped_vae_loses_little_in_bfloat16():
    assert speed.bf16_psnr(CPU) > 35


@torch.no_grad()
def test_every_random_weight_is_a_usable_number():
    for make, dtype in ((partial(GarmentEncoder, TINY.unet), torch.bfloat16), (small_eye, torch.float32)):
        net = HERE.fill(make, dtype)
        for p in net.parameters():
            assert p.dtype == dtype and p.isfinite().all() and p.abs().max() < 1
            assert p.numel() < 100 or p.float().std() > 0.01
    assert torch.equal(net.model.embeddings.position_ids[0], torch.arange(257))  # which blank has no numbers


def small_eye() -> torch.nn.Module:
    return peers.image_encoder(SIZES["tiny"].plain)


def test_wrong_arguments_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="repeats"):
        speed.main(["--repeats", "0"])
    with pytest.raises(UserError, match="device"):
        speed.main(["--size", "tiny", "--device", "abacus"])
    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(UserError, match="compares with diffusers, which is not installed: pip install"):
        next(workloads.steps(SIZES["tiny"], HERE))


def missing(name: str):
    raise ImportError(name)


# Search


def test_searching_prints_each_kind_beside_the_product_of_the_same_bytes(capsys):
    search_speed.main(["--tiny", "--repeats", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    for n in (1000, 2000):
        rows = re.findall(
            rf"^ *{n}  (text|picture|both) +\S+ +(\S+) +(\S+) +(\S+) +\S+ +\S+ +(\S+) +\S+ +\S+$",
            out,
            re.MULTILINE,
        )
        assert [row[0] for row in rows] == ["text", "picture", "both"]
        for _, seconds, product, ratio, above in rows:
            assert float(seconds) > 0 and float(product) > 0 and float(ratio) > 0
            assert 50 < float(above) < 10_000
    with pytest.raises(UserError, match="repeats"):
        search_speed.main(["--repeats", "0"])


def test_the_product_beside_a_search_is_of_all_that_is_stored(tmp_path):
    catalog = search_speed.random_catalog(tmp_path, 300, (4, 16))
    assert torch.allclose(catalog.images.float().norm(dim=-1), torch.tensor(1.0), atol=1e-3)
    steps = search_speed.searches_of(catalog, CPU)
    for kind in search_speed.KINDS:
        assert len(steps[kind]()) == 10
        scores = steps[f"{kind}, product"]().float()
        scores = scores / 4 if kind == "picture" else scores.view(300, 4).amax(1)
        if kind != "both":  # whose captions' product is made, too, and not kept
            assert torch.allclose(steps[kind]().float(), scores.topk(10).values, atol=2e-3)
