"""The work that `eval.speed` times: ours, and the same by a peer, with what it computes and reads at least."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eval import peers
from eval.search_speed import random_catalog, searches_of
from eval.sizes import Size
from eval.timing import CPU, Call
from unifashion import fast, lora, training, tryon
from unifashion.llama import Llama, generate
from unifashion.model import UniFashion
from unifashion.preprocess import pad_to_ratio, save_png, torso_mask
from unifashion.search import image_embeddings
from unifashion.stableviton import StableVITON, StableVITONConfig
from unifashion.unet import UNet
from unifashion.vae import VAE
from weights.llama import LLAMA
from weights.rename import blank, load_into


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    compiles: bool

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def fill(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        return random_weights(make, self.device, dtype or self.dtype)


class Workload(NamedTuple):
    name: str
    n: int  # what one call makes: pictures, tokens, samples
    flops: int
    bytes: int
    calls: dict[str, Call]  # who -> one call; the first of the peers is the one as it comes
    held: dict[str, list[Tensor]] | None = None  # in training: what is there between two calls


@torch.no_grad()
def random_weights(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network filled with one repeated pattern: billions of true random numbers would take longer than the test."""
    net = blank(make)
    if any(True for _ in net.buffers()):
        with torch.device(device):  # blank, they would have no numbers
            net = make()
    net = net.to(dtype).to_empty(device=device) if next(net.parameters()).is_meta else net.to(device, dtype)
    pattern = (0.02 * torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for p in net.parameters():
        p.copy_(pattern.repeat(p.numel() // len(pattern) + 1)[: p.numel()].view_as(p))
    return net.eval().requires_grad_(False)


def count(call: Callable[[], object]) -> int:
    """FLOPs; counted on the meta device, because on a CPU the counter does not see fused attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def size_of(*nets: nn.Module) -> int:
    """Bytes of weights."""
    return sum(p.numel() * p.element_size() for net in nets for p in net.parameters())


def compiled(what: nn.Module, method: str = "forward", **how: object) -> Call:
    """`what`, where its `method` is compiled. Eagerly it runs as before (`settings`)."""
    setattr(what, method, torch.compile(getattr(what, method), dynamic=False, **how))
    return what


def best(place: Place, peer: str) -> str:
    return f"{peer}, channels last" + ", compiled" * place.compiles


# drawing


def a_call(place: Place, cfg: StableVITONConfig, b: int) -> tuple[Tensor, ...]:
    """What `Denoiser.network` reads at one step: x, t, 32 tokens of context, hint."""
    x = place.draw(b, cfg.unet.in_channels, *cfg.latent)
    t = torch.full((b,), 981, device=place.device)
    hint = place.draw(b, cfg.vae.latent_channels, *cfg.latent)
    return x, t, place.draw(b, 32, cfg.unet.context_dim), hint if cfg.dresses else None


def network_of(model: StableVITON, x: Tensor, t: Tensor, context: Tensor, hint: Tensor | None) -> Call:
    for_garment = model.garment.context(context) if hint is not None else []
    return partial(model.network, x, t, model.unet.context(context), for_garment, hint, None)


def step_flops(cfg: StableVITONConfig, b: int) -> int:
    place = Place(torch.device("meta"), torch.float32, False)
    return count(network_of(blank(lambda: StableVITON(cfg)), *a_call(place, cfg, b)))


def step_bytes(model: StableVITON) -> int:
    if not model.cfg.dresses:
        return size_of(model.unet)
    parts = dict(model.garment.named_children())
    read = parts.pop("encoder").blocks[: len(model.garment.control_convs)]  # the others are not run
    return size_of(model.unet, read, *parts.values())


def steps(size: Size, place: Place) -> Iterator[Workload]:
    for cfg, name in ((size.plain, "step"), (size.dressed, "step, with the garment")):
        inputs, model = a_call(place, cfg, 2), fast.in_order(place.fill(partial(StableVITON, cfg)))
        calls: dict[str, Call] = {"ours": network_of(model, *inputs)}
        if place.compiles:
            fast.compile_drawing(model, lambda note: None)
            calls["ours, compiled"] = network_of(model, *inputs)
        if name == "step":
            for who in ("diffusers", best(place, "diffusers")):
                net = place.fill(partial(peers.unet, cfg.unet))
                if who != "diffusers":
                    net = net.to(memory_format=torch.channels_last)
                if "compiled" in who:
                    net = compiled(net, mode="max-autotune", fullgraph=True)
                x, t, context, _ = inputs
                calls[who] = lambda net=net, x=x, t=t, context=context: net(x, t, context, return_dict=False)[
                    0
                ]
        yield Workload(name, 1, step_flops(cfg, 2), step_bytes(model), calls)


def tryons(size: Size, place: Place) -> Iterator[Workload]:
    models = {"try-on": size.plain, "try-on, with the garment": size.dressed}
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in models.items():
            yield from images(name, cfg, size, place, Path(folder))


def images(name: str, cfg: StableVITONConfig, size: Size, place: Place, folder: Path) -> Iterator[Workload]:
    model = fast.in_order(place.fill(partial(StableVITON, cfg)))
    pipes = {}
    if not cfg.dresses:
        for who in ("diffusers", best(place, "diffusers")):
            pipes[who] = pipe = peers.paint_by_example(cfg, place.fill)
            if who != "diffusers":
                for net in (pipe.unet, pipe.vae):
                    net.to(memory_format=torch.channels_last)
            if "compiled" in who:
                compiled(pipe.unet, mode="max-autotune", fullgraph=True)
                compiled(pipe.vae, "decode", fullgraph=True)
    if place.compiles:
        fast.compile_drawing(model, lambda note: None)
    photos = [photo(cfg.picture, seed) for seed in range(3)]
    with torch.device("meta"):
        shadow = StableVITON(cfg)
        picture, latent = (
            torch.empty(1, 3, *cfg.picture),
            torch.empty(1, cfg.vae.latent_channels, *cfg.latent),
        )
        read = torch.empty(1, 3, cfg.image.image_size, cfg.image.image_size)
    before = count(lambda: shadow.context(shadow.see(read)))
    before += count(lambda: shadow.vae.encode(picture)) * (3 if cfg.dresses else 1)
    after = count(lambda: shadow.vae.decode(latent))
    for sampler, n in size.samplers:
        for b in size.pictures:
            made = partial(picture_files, model, photos, folder, b, n, sampler)
            calls: dict[str, Call] = {"ours": made} | ({"ours, compiled": made} if place.compiles else {})
            for who, pipe in pipes.items():
                pipe.scheduler = peers.scheduler(sampler)
                calls[who] = partial(their_files, pipe, photos, folder, b, n)
            asked = n + (sampler == "plms")
            flops = asked * step_flops(cfg, 2 * b) + before + b * after
            told = f"{name}, {sampler.upper()} {n}, {b}"
            yield Workload(told, b, flops, asked * step_bytes(model) + size_of(model.vae, model.image), calls)


def photo(picture: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*picture, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_files(
    model: StableVITON, photos: list[Image.Image], folder: Path, b: int, n: int, sampler: str
) -> Tensor:
    """As `infer.py tryon`, from photos in memory to files."""
    (person, cloth, pose), cfg = photos, model.cfg
    mask = torso_mask(person.size)
    canvas, box = pad_to_ratio(person, cfg.picture[1] / cfg.picture[0])
    inputs = tryon.person_tensors(person, mask, pose if cfg.dresses else None, cfg)
    inputs = {k: x[None] for k, x in (inputs | tryon.exemplar_tensors(cloth, cfg)).items()}
    asked = argparse.Namespace(num=b, seed=0, steps=n, sampler=sampler, guidance=5.0, quiet=True)
    pictures = tryon.draw(model, inputs, asked)
    for i, picture in enumerate(pictures):
        save_png(tryon.pasted(picture, person, mask, box, canvas.size), folder / f"{i}.png")
    return torch.stack(pictures)


def their_files(pipe: Callable, photos: list[Image.Image], folder: Path, b: int, n: int) -> Tensor:
    person, cloth, _ = photos
    made = pipe(
        example_image=cloth,
        image=person,
        mask_image=torso_mask(person.size),
        height=person.height,
        width=person.width,
        num_inference_steps=n,
        guidance_scale=5.0,
        num_images_per_prompt=b,
    )
    for i, picture in enumerate(made.images):
        picture.save(folder / f"{i}.png")
    return torch.ones(1)


def decodings(size: Size, place: Place) -> Iterator[Workload]:
    cfg = size.dressed
    latent = place.draw(1, cfg.vae.latent_channels, *cfg.latent)
    ours, theirs = fast.in_order(place.fill(partial(VAE, cfg.vae))), place.fill(partial(peers.vae, cfg.vae))
    calls = {"ours": lambda: ours.decode(latent)}
    if place.compiles:
        calls["ours, compiled"] = lambda: faster(latent)
        faster = torch.compile(ours.decode, dynamic=False)
    calls["diffusers"] = lambda: theirs.decode(latent / cfg.vae.scale).sample
    in_order = place.fill(partial(peers.vae, cfg.vae)).to(memory_format=torch.channels_last)
    if place.compiles:
        compiled(in_order, "decode", fullgraph=True)
    calls[best(place, "diffusers")] = lambda: in_order.decode(latent / cfg.vae.scale).sample
    shadow = blank(lambda: VAE(cfg.vae))
    yield Workload(
        "decode",
        1,
        count(lambda: shadow.decode(latent.to("meta", torch.float32))),
        size_of(ours.decoder),
        calls,
    )


# words and embeddings


def writings(size: Size, place: Place) -> Iterator[Workload]:
    cfg, tokens = size.fashion.llama, size.tokens
    with torch.device(place.device):
        theirs = peers.llama(cfg).to(place.dtype).eval().requires_grad_(False)
    ours = blank(lambda: Llama(cfg)).eval().requires_grad_(False)
    load_into(ours, theirs.state_dict(), LLAMA)  # the same weights, not a copy
    if place.compiles:
        fast.compile_writing(nn.ModuleDict({"llama": ours}), lambda note: None)
    shadow = blank(lambda: Llama(cfg))
    for b in size.captions:
        prompt = 0.02 * place.draw(b, size.tokens, cfg.dim)
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=place.device)
        ours_call = partial(generate, ours, prompt, mask, tokens, eos=-1)
        their_call = partial(peers.generate, theirs, prompt, tokens)
        calls: dict[str, Call] = {"ours": ours_call}
        if place.compiles:
            calls["ours, compiled"] = ours_call
        calls["transformers"] = their_call
        # which compiles by itself, but on no CPU
        static = "transformers, static cache" + ", compiled" * (
            place.compiles and place.device.type == "cuda"
        )
        calls[static] = partial(their_call, cache_implementation="static")
        with torch.compiler.set_stance("force_eager"):
            same = place.dtype != torch.float32 or torch.equal(ours_call(), their_call())
        if not same:
            raise RuntimeError("the two write different tokens: their times would mean nothing")
        known = torch.empty(b, 1, cfg.dim, device="meta")
        # The prompt gives the first token. Of the embeddings a step reads no more than its tokens' rows.
        flops = (tokens - 1) * count(lambda x=known: shadow.logits(shadow(x)))
        flops += count(lambda x=prompt: shadow.logits(shadow(x.to("meta", torch.float32))[:, -1]))
        read = tokens * size_of(ours.layers, ours.norm, ours.lm_head)
        yield Workload(f"write, {b}", b * tokens, flops, read, calls)


def embeddings(size: Size, place: Place) -> Iterator[Workload]:
    cfg, b = size.fashion, size.seen
    pictures = place.draw(b, 3, *cfg.vit.image_size)
    ours = place.fill(partial(UniFashion, cfg, draws=False))
    theirs = place.fill(partial(peers.blip2, cfg.vit, cfg.qformer))
    calls: dict[str, Call] = {
        "ours": lambda: image_embeddings(ours, pictures),
        "transformers": lambda: peers.embed(theirs, pictures),
    }
    shadow = blank(lambda: UniFashion(cfg, draws=False))
    shadow.qformer.embed_image = lambda z: shadow.qformer.vision_proj(
        z
    )  # to norm the vectors is nothing, and asks for an autocast
    flops = count(lambda: image_embeddings(shadow, pictures.to("meta", torch.float32)))
    yield Workload(f"embed, {b}", b, flops, size_of(ours), calls)


def searches(size: Size, place: Place) -> Iterator[Workload]:
    q, d = size.fashion.qformer.queries, size.fashion.qformer.embed_dim
    with tempfile.TemporaryDirectory() as folder:
        # on the CPU, where the catalogue's file is mapped, and where the peer multiplies
        found = searches_of(random_catalog(Path(folder), size.gallery, (q, d)), CPU)
        calls = {"ours": found["text"], "product": found["text, product"]}
        read = 2 * size.gallery * q * d if place.device == CPU else 0  # a GPU's speed is no floor
        yield Workload(f"search, {size.gallery:,}", 1, read, read, calls)


# training


def trainings(size: Size, place: Place) -> Iterator[Workload]:
    yield from unet_training(size, place)
    yield from lora_training(size, place)


def learning(net: nn.Module, loss: Callable[[], Tensor], place: Place) -> tuple[Call, list[Tensor]]:
    """One step of what requires a gradient -> it, and what there is between two steps."""
    learns = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-6, fused=True)

    def step() -> Tensor:
        with torch.enable_grad(), training.autocast(place.device, "bf16" if narrow else "fp32"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    narrow = place.dtype == torch.bfloat16
    step()  # now the moments are there
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return step, [*net.parameters(), *moments]


def unet_training(size: Size, place: Place) -> Iterator[Workload]:
    cfg, b, wide = size.plain, size.scenes, place._replace(dtype=torch.float32)
    x, t, context, _ = a_call(wide, cfg, b)
    noise = wide.draw(b, 4, *cfg.latent)
    ours, theirs = (
        wide.fill(make).train() for make in (partial(UNet, cfg.unet), partial(peers.unet, cfg.unet))
    )
    training.checkpointing(ours)
    theirs.enable_gradient_checkpointing()
    calls, held = {}, {}
    for who, net, call in (
        ("ours", ours, lambda: ours(x, t, ours.context(context))),
        ("diffusers", theirs, lambda: theirs(x, t, context).sample),
    ):
        net.requires_grad_(True).to(memory_format=torch.channels_last)  # as our scripts have it
        loss = lambda call=call: F.mse_loss(call().float(), noise)  # noqa: E731
        calls[who], held[who] = learning(net, loss, place)
    shadow = blank(lambda: UNet(cfg.unet)).train().requires_grad_(True)
    training.checkpointing(shadow)
    inputs = [v.to("meta") for v in (x, t, context)]
    with torch.enable_grad():
        flops = count(lambda: shadow(*inputs[:2], shadow.context(inputs[2])).sum().backward())
    yield Workload(f"train the U-Net, {b}", b, flops, 3 * size_of(ours), calls, held)


def lora_training(size: Size, place: Place) -> Iterator[Workload]:
    cfg, (b, n) = size.fashion.llama, size.rows
    ids = torch.randint(3, cfg.vocab_size, (b, n)).to(place.device)

    def adapt(net: Llama) -> Llama:
        """Ours, with LoRA."""
        lora.inject(net, size.fashion.lora)
        for name, p in net.named_parameters():
            p.requires_grad_(name.endswith(("lora_a", "lora_b")))
        training.checkpointing(net)
        return net.train()

    def ours_loss(net: Llama, tokens: Tensor) -> Tensor:
        logits = net.logits(net(net.embed(tokens))[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    ours = adapt(place.fill(partial(Llama, cfg)))
    theirs = place.fill(partial(peers.llama, cfg))
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    theirs = peers.with_lora(theirs, size.fashion.lora).train()
    calls, held = {}, {}
    calls["ours"], held["ours"] = learning(ours, lambda: ours_loss(ours, ids), place)
    peer = lambda: theirs(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    calls["transformers and peft"], held["transformers and peft"] = learning(theirs, peer, place)
    shadow = blank(lambda: Llama(cfg))
    with torch.device("meta"), torch.enable_grad():
        adapt(shadow)
        flops = count(lambda: ours_loss(shadow, ids.to("meta")).backward())
    yield Workload(f"train LoRA, {b} x {n}", b, flops, 2 * size_of(ours), calls, held)
