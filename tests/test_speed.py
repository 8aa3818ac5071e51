"""eval/speed.py on the TINY preset: it runs, and what it prints is what it measured. No time is asserted."""

import re

import pytest
import torch

from eval import speed
from unifashion import UserError
from unifashion.config import FULL, TINY
from unifashion.garment import GarmentEncoder
from unifashion.unet import UNet

CPU = torch.device("cpu")


@pytest.mark.slow
def test_it_prints_the_machine_and_each_network_with_its_ratio(capsys):
    speed.main(["--tiny", "--repeats", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert 0.1 < float(re.search(r"peak memory (\S+) GiB", out)[1]) < 24
    assert f"{torch.get_num_threads()} threads" in out and torch.__version__ in out
    for name in ("ours, with the garment", "ours, the U-Net alone", "diffusers"):
        assert re.search(rf"^{name} +\S+ +\S+ +\d+\.\d\d +\S+ +\d+\.\d\d   \S+ \S+$", out, re.MULTILINE)


def test_ratios_are_of_medians_to_diffusers():
    rounds = {
        "ours": [speed.Round(9.0, 5.0), speed.Round(3.0, 4.0), speed.Round(1.0, 6.0)],
        "diffusers": [speed.Round(2.0, 4.0), speed.Round(50.0, 4.0), speed.Round(1.0, 4.0)],
    }
    lines = speed.report({"ours": 2 * 10**9, "diffusers": 10**9}, rounds).splitlines()
    assert lines[1].split() == ["ours", "2", "3", "1.50", "5", "1.25", "9", "3", "1"]
    assert lines[2].split() == ["diffusers", "1", "2", "1.00", "4", "1.00", "2", "50", "1"]


def test_networks_take_turns_and_the_first_round_is_not_timed():
    calls = []
    steps = {name: lambda name=name: (calls.append(name), torch.ones(1))[1] for name in "ab"}
    rounds = speed.measure(steps, 3, CPU)
    assert calls == list("ab" * 4)
    assert [len(times) for times in rounds.values()] == [3, 3]


def test_numbers_that_are_not_finite_are_not_timed():
    with pytest.raises(RuntimeError, match="not finite"):
        speed.measure({"diffusers": lambda: torch.tensor(float("nan"))}, 1, CPU)


def test_at_full_size_ours_alone_does_the_work_of_diffusers_and_the_garment_nearly_doubles_it():
    work = speed.multiply_adds(FULL.unet, FULL.latent)
    alone, theirs = work["ours, the U-Net alone"], work["diffusers"]
    assert 575e9 < alone < theirs < 578e9  # fewer: no keys and values of the context at every step
    assert 1.8 < work["ours, with the garment"] / theirs < 1.9


def test_diffusers_is_as_large_as_ours_at_full_size():
    with torch.device("meta"):
        ours, theirs = UNet(FULL.unet), speed.diffusers_unet(FULL.unet)
    assert (
        sum(p.numel() for p in ours.parameters())
        == sum(p.numel() for p in theirs.parameters())
        == 859_546_884
    )


def test_every_random_weight_is_a_usable_number():
    net = speed.random_weights(lambda: GarmentEncoder(TINY.unet), CPU)
    for p in net.parameters():
        assert p.dtype == torch.bfloat16 and p.isfinite().all() and p.abs().max() < 1
        assert p.numel() < 100 or p.float().std() > 0.01


def test_wrong_arguments_are_one_line():
    with pytest.raises(UserError, match="repeats"):
        speed.main(["--repeats", "0"])
    with pytest.raises(UserError, match="device"):
        speed.main(["--tiny", "--device", "abacus"])


def test_writing_prints_both_writers_of_the_same_tokens_and_their_ratio(capsys):
    speed.main(["write", "--tiny", "--repeats", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "float32" in out and out.count("the same tokens") == 2
    for b in (1, 8):
        rows = re.findall(
            rf"^{b} +(ours|transformers) +\S+ +(\S+) +(\d+\.\d\d)   \S+ \S+$", out, re.MULTILINE
        )
        assert [name for name, _, _ in rows] == ["ours", "transformers"] and rows[1][2] == "1.00"
        rates = [float(rate) for _, rate, _ in rows]
        assert float(rows[0][2]) == pytest.approx(rates[0] / rates[1], abs=0.02)


def test_writers_write_all_the_tokens_that_are_timed():
    for b, tokens in ((1, 5), (3, 9)):
        steps = speed.writers_of(TINY.llama, b, tokens, CPU)
        ours, theirs = (step() for step in steps.values())
        assert ours.shape == (b, tokens) and torch.equal(ours, theirs)


def test_a_rate_is_of_all_tokens_of_the_batch_at_the_median():
    rounds = {
        "ours": [speed.Round(1.0, 0), speed.Round(9.0, 0), speed.Round(2.0, 0)],
        "transformers": [speed.Round(4.0, 0)] * 3,
    }
    lines = speed.report_writing(10, {8: rounds}).splitlines()
    assert lines[1].split() == ["8", "ours", "2.000", "40.0", "2.00", "1.000", "9.000", "2.000"]
    assert lines[2].split()[:5] == ["8", "transformers", "4.000", "20.0", "1.00"]


def test_searching_prints_each_kind_beside_the_product_of_the_same_bytes(capsys):
    speed.main(["search", "--tiny", "--repeats", "1", "--device", "cpu"])
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


def test_the_product_beside_a_search_is_of_all_that_is_stored(tmp_path):
    catalog = speed.random_catalog(tmp_path, 300, (4, 16))
    assert torch.allclose(catalog.images.float().norm(dim=-1), torch.tensor(1.0), atol=1e-3)
    steps = speed.searches_of(catalog, CPU)
    for kind in speed.KINDS:
        assert len(steps[kind]()) == 10
        scores = steps[f"{kind}, product"]().float()
        scores = scores / 4 if kind == "picture" else scores.view(300, 4).amax(1)
        if kind != "both":  # whose captions' product is made, too, and not kept
            assert torch.allclose(steps[kind]().float(), scores.topk(10).values, atol=2e-3)
