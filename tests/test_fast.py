"""What `unifashion/fast.py` compiles against the same without: the same results, one graph a shape, told once."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.parity import randomise
from tests.small_runs import MINI
from unifashion import UserError, fast
from unifashion.llama import Llama, LlamaConfig, generate
from unifashion.model import UniFashion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels are kept; the user's own home, and what other tests compile, are left alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    yield tmp_path
    torch._dynamo.reset()


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: Callable | str) -> None:
    """For inductor, which takes minutes, a backend that runs what was traced."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: real(f, backend=backend, **how))


def drawing(prediction: str = "v") -> tuple[UniFashion, Callable[..., list[Tensor]]]:
    """A model, and what draws and decodes with it: the latents after each step, and the picture."""
    model = (
        randomise(UniFashion(replace(MINI, prediction=prediction)), seed=0)
        .float()
        .eval()
        .requires_grad_(False)
    )
    torch.manual_seed(0)
    noise, hint = (torch.randn(1, 4, *MINI.latent) for _ in range(2))
    scene, context = torch.randn(1, 9, *MINI.latent), torch.randn(1, 3, MINI.unet.context_dim)

    @torch.no_grad()
    def draw(steps: int = 4, guidance: float = 2.0) -> list[Tensor]:
        *latents, last = model.sample(noise, scene, context, hint, steps, "plms", guidance)
        return [*latents, last, model.vae.decode(last)]

    return model, draw


def test_compiled_it_draws_the_same_in_one_graph_of_all_that_a_step_runs(monkeypatch):
    model, draw = drawing()
    plain = draw()
    counter, told = CompileCounter(), []
    compiled_by(monkeypatch, counter)
    fast.compile_drawing(fast.in_order(model), told.append)
    assert_same(draw(), plain)
    draw(7)
    # A step, and the VAE: no step was compiled anew.
    assert counter.frame_count == 2 and counter.op_count > 100
    assert [note.partition(" in ")[0] for note in told] == ["compiled the U-Net", "compiled the VAE"]


def test_a_graph_that_gives_every_result_in_the_same_place_is_no_trap(monkeypatch):
    """As those that CUDA records: of eps without guidance, in float32, the sampler would keep what the next step overwrites."""
    model, draw = drawing("eps")
    plain, place = draw(guidance=1.0), []

    def recorded(function, **how):
        def replay(*args):
            if not place:
                place.append(function(*args))
            return place[0].copy_(function(*args))

        return replay if "mode" in how else function

    monkeypatch.setattr(torch, "compile", recorded)
    fast.compile_drawing(model, lambda note: None)
    assert_same(draw(guidance=1.0), plain)


@pytest.mark.full  # minutes: of compiling
def test_inductors_kernels_draw_the_same_and_are_kept_in_the_home(home: Path):
    model, draw = drawing()
    plain, told = draw(), []
    fast.compile_drawing(model, told.append)
    assert_same(draw(), plain)
    kept = home / ".cache/unifashion/kernels"
    assert any(kept.iterdir()) and told[0].endswith(f"the kernels are kept in {kept}")


def test_without_a_home_to_write_to_kernels_are_kept_where_torch_keeps_them(home: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "file"))
    (home / "file").touch()
    assert fast._keep_kernels() == tempfile.gettempdir() and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert fast._keep_kernels() == "mine"


def test_where_torch_cannot_compile_it_is_one_line(monkeypatch):
    def none(graph, inputs):
        raise FileNotFoundError("no C++ compiler\nand more")

    model, draw = drawing()
    compiled_by(monkeypatch, none)
    fast.compile_drawing(model, lambda note: None)
    with pytest.raises(
        UserError, match=r"^torch cannot compile the U-Net here \(.*no C\+\+ compiler.*\): leave out"
    ):
        draw()


def test_compiled_it_writes_the_same_and_the_prompt_and_the_steps_are_few_graphs(monkeypatch):
    cfg = LlamaConfig(vocab_size=50, dim=24, depth=2, heads=3, mlp_dim=40, context=256)
    llama = randomise(Llama(cfg), seed=1).float().eval().requires_grad_(False)
    writer = torch.nn.ModuleDict({"llama": llama})
    prompts = [torch.randn(2, t, cfg.dim, generator=torch.Generator().manual_seed(t)) for t in (9, 9)]

    def write(beams: int = 1) -> list[Tensor]:
        masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in prompts]
        return [generate(llama, x, m, 100, eos=-1, beams=beams) for x, m in zip(prompts, masks, strict=True)]

    plain, beams = write(), write(beams=2)
    counter, told = CompileCounter(), []
    compiled_by(monkeypatch, counter)
    fast.compile_writing(writer, told.append)
    assert all(torch.equal(a, b) for a, b in zip(write(), plain, strict=True))
    assert counter.frame_count == 3  # the prompt, a step, and a step with any number of tokens before it
    assert all(torch.equal(a, b) for a, b in zip(write(beams=2), beams, strict=True))
    assert len(told) == 1


def assert_same(found: list[Tensor], plain: list[Tensor]) -> None:
    """What sums in another order changes: 1e-4 of the largest number."""
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
