"""What `unifashion/fast.py` compiles against the same without: the same results, one graph a shape, told once."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.faults import plant
from tests.parity import randomise
from tests.recording import simulate
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
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def drawing(
    prediction: str = "v", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[UniFashion, Callable[..., list[Tensor]]]:
    """A model, and what draws and decodes with it: the latents after each step, and the picture."""
    model = (
        randomise(UniFashion(replace(MINI, prediction=prediction)), seed=0)
        .to(device, dtype)
        .eval()
        .requires_grad_(False)
    )

    @torch.no_grad()
    def draw(steps: int = 4, guidance: float = 2.0, seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        noise = torch.randn(1, 4, *MINI.latent).to(device)
        hint, scene = (torch.randn(1, c, *MINI.latent).to(device, dtype) for c in (4, 9))
        context = torch.randn(1, 3, MINI.unet.context_dim).to(device, dtype)
        *latents, last = model.sample(noise, scene, context, hint, steps, "plms", guidance)
        return [*latents, last, model.vae.decode(last.to(dtype))]

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


@pytest.mark.parametrize(("prediction", "guidance"), [("eps", 1.0), ("v", 2.0)])
def test_recorded_it_draws_the_same(prediction: str, guidance: float, monkeypatch):
    """Also of eps without guidance, where in float32 the sampler keeps what the network gave it: its own, not the graph's."""
    model, draw = drawing(prediction)
    one, two = draw(guidance=guidance), draw(7, guidance, seed=1)
    simulate(monkeypatch)
    calls, network = [], model.network
    model.network = fast.Recorded(lambda *args: (calls.append(1), network(*args))[1])
    # To the bit: what is computed is the same, where it lies is not.
    assert all(map(torch.equal, draw(guidance=guidance), one))
    assert all(map(torch.equal, draw(7, guidance, seed=1), two))
    assert len(calls) == 2  # to warm up, and to be recorded


@pytest.mark.parametrize("beams", [1, 2])
def test_recorded_it_writes_the_same(beams: int, monkeypatch):
    llama, write = writing()
    plain, steps, step = write(beams), [], llama.step
    simulate(monkeypatch)
    llama.record = fast.Recorded
    monkeypatch.setattr(llama, "step", lambda *args: (steps.append(args[2].shape), step(*args))[1])
    assert all(map(torch.equal, write(beams), plain))
    assert [n for _, n in steps] == [128, 128, 256, 256]  # of each text one step, twice


@pytest.mark.parametrize(
    "wrong", ["result.clone()", "place.copy_(x)", "graph.replay()", "self.function(*args)\n        return"]
)
def test_the_simulated_graphs_notice(wrong: str, monkeypatch):
    """Results that are not copied, inputs that are not, nothing replayed, one more run than CUDA's."""
    simulate(monkeypatch)
    line = {
        "result.clone()": "result",
        "self.function(*args)\n        return": "self.function(*args) + 1\n        return",
    }
    plant(monkeypatch, fast, "Recorded", wrong, line.get(wrong, "pass"))
    double = fast.Recorded(lambda x: 2 * x)
    found = [double(torch.full((2,), x)) for x in (1.0, 2.0)]
    assert [x[0].item() for x in found] != [2.0, 4.0]


@pytest.mark.parametrize("what", ["of the device", "of Python"])
def test_numbers_in_what_is_recorded(what: str, monkeypatch):
    """To wait for one is an error in CUDA, too; of Python it is, as there, what it was when recorded."""
    simulate(monkeypatch)
    if what == "of the device":
        with pytest.raises(AssertionError, match="_local_scalar_dense is not allowed while CUDA records"):
            fast.Recorded(lambda x: x * x.sum().item())(torch.ones(2))
    else:
        factors = iter((1.0, 1.0, 3.0))
        times = fast.Recorded(lambda x: x * next(factors))
        assert [times(torch.ones(1)).item() for _ in range(3)] == [1.0, 1.0, 1.0] and next(factors) == 3.0


def test_a_graph_is_for_one_kind_of_inputs(monkeypatch):
    simulate(monkeypatch)
    both = fast.Recorded(lambda x, more: x + sum(more) if more else -x)
    one, two = torch.ones(1), torch.ones(1, dtype=torch.float64)
    for _ in range(2):
        assert both(one, None) == -1 and both(one, [one]) == 2 and both(two, [one]).dtype == torch.float64
        assert both(torch.ones(3), [one]).shape == (3,)
    assert len(both.graphs) == 4


def test_on_cuda_what_is_compiled_is_recorded(monkeypatch):
    simulate(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    monkeypatch.setattr(fast, "on_cuda", lambda model: True)
    model, draw = drawing()
    plain = draw()
    fast.compile_drawing(model, lambda note: None)
    assert all(map(torch.equal, draw(), plain)) and len(model.network.graphs) == 1
    llama, write = writing()
    plain = write()
    fast.compile_writing(SimpleNamespace(llama=llama), lambda note: None)
    assert all(map(torch.equal, write(), plain)) and llama.record is fast.Recorded


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudas_graphs_give_the_same(dtype: torch.dtype, compiled: bool):
    model, draw = drawing("eps", "cuda", dtype)
    plain = draw(guidance=1.0), draw(7, seed=1)
    llama, write = writing("cuda", dtype)
    texts = write(), write(2)
    if compiled:
        fast.compile_drawing(fast.in_order(model), lambda note: None)
        fast.compile_writing(SimpleNamespace(llama=llama), lambda note: None)
    else:
        model.network, llama.record = fast.Recorded(model.network), fast.Recorded
    off = 1e-4 if dtype == torch.float32 else 0.1
    assert_same(draw(guidance=1.0), plain[0], off)
    assert_same(draw(7, seed=1), plain[1], off)
    assert len(model.network.graphs) == 2
    found = write(), write(2)
    if dtype == torch.float32 or not compiled:  # rounded otherwise, another word may be likelier
        assert all(map(torch.equal, found[0] + found[1], texts[0] + texts[1]))


@pytest.mark.full  # minutes: of compiling
def test_inductors_kernels_draw_and_write_the_same_and_are_kept_in_the_home(home: Path):
    model, draw = drawing()
    llama, write = writing()
    plain, texts, told = draw(), write(), []
    fast.compile_drawing(model, told.append)
    fast.compile_writing(SimpleNamespace(llama=llama), told.append)
    assert_same(draw(), plain)
    assert all(map(torch.equal, write(), texts))
    kept = home / ".cache/unifashion/kernels"
    assert any(kept.iterdir()) and told[0].endswith(f"the kernels are kept in {kept}") and len(told) == 3
    # Nowhere is the cache, or a layer of it, copied at a step.
    code = "".join(path.read_text() for path in kept.rglob("*.py"))
    assert "(2, 3, 1, 8)" in code and not re.search(r"empty_strided_cpu\(\((2, )?2, 3, (128|256), 8\)", code)


def test_without_a_home_to_write_to_kernels_are_kept_where_torch_keeps_them(home: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "file"))
    (home / "file").touch()
    assert fast._keep_kernels() == tempfile.gettempdir() and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert fast._keep_kernels() == "mine"


def test_where_torch_cannot_compile_it_is_one_line(monkeypatch):
    def none(graph, inputs):
        raise FileNotFoundError("no C++ compiler\nand more")

    compiled_by(monkeypatch, none)
    llama, write = writing()
    fast.compile_writing(SimpleNamespace(llama=llama), lambda note: None)
    with pytest.raises(
        UserError, match=r"^torch cannot compile the LLM's step here \(.*no C\+\+ compiler.*\): leave out"
    ):
        write()


def test_compiled_it_writes_the_same_and_a_step_is_one_graph_of_whatever_prompt(monkeypatch):
    llama, write = writing()
    plain, beams = write(), write(2)
    counter, told = CompileCounter(), []
    compiled_by(monkeypatch, counter)
    fast.compile_writing(torch.nn.ModuleDict({"llama": llama}), told.append)
    assert all(map(torch.equal, write(), plain))
    assert counter.frame_count == 2  # a step, and one with any number of pieces of the cache
    assert all(map(torch.equal, write(2), beams))
    assert counter.frame_count == 3 and len(told) == 1  # and of any number of rows


def writing(
    device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Llama, Callable[..., list[Tensor]]]:
    """An LLM, and what writes with it: after a short prompt and, two pieces of the cache in all, after a long one."""
    cfg = LlamaConfig(vocab_size=50, dim=24, depth=2, heads=3, mlp_dim=40, context=256)
    llama = randomise(Llama(cfg), seed=1).to(device, dtype).eval().requires_grad_(False)
    prompts = [
        torch.randn(2, t, cfg.dim, generator=torch.Generator().manual_seed(t)).to(device, dtype)
        for t in (9, 60)
    ]

    def write(beams: int = 1) -> list[Tensor]:
        masks = [torch.ones(x.shape[:2], dtype=torch.bool, device=device) for x in prompts]
        return [generate(llama, x, m, 100, eos=-1, beams=beams) for x, m in zip(prompts, masks, strict=True)]

    return llama, write


def assert_same(found: list[Tensor], plain: list[Tensor], off: float = 1e-4) -> None:
    """What sums in another order changes: this much of the largest number."""
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).abs().max() < off * b.abs().max()
