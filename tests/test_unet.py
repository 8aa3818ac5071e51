"""The U-Net against CompVis' (golden case unet9), against diffusers', and its table against the published files."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tests.faults import plant
from tests.goldens import load
from tests.parity import assert_parity, randomise
from tests.published import published
from unifashion import blocks, unet
from unifashion.blocks import Attention, ResBlock, SpatialTransformer, UNetConfig
from unifashion.unet import UNet
from weights.rename import Table, load_into, load_layout
from weights.unet import PREFIX, UNET, UNETS

GOLDEN = load("unet9")
BLOCKS = [*(f"in_{i}" for i in range(6)), "mid", *(f"out_{i}" for i in range(6))]
# Every level of the golden has the same width, so no res block of its encoder has a shortcut to name.
TABLE = {row: ours for row, ours in UNET.items() if row != "input_blocks.#.0.skip_connection.*"}


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    """Ours, under the names of the golden."""
    net, found = golden_unet(), {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.update({name: output})

    for i, block in enumerate(net.encoder.blocks):
        block.register_forward_hook(keep(f"in_{i}"))
    net.encoder.middle_out.register_forward_hook(keep("mid"))
    for i, block in enumerate(net.decoder):
        block.register_forward_hook(keep(f"out_{i}"))
    net.time_embed.register_forward_hook(keep("emb"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "timestep_embedding", golden_table)
        return {"eps": golden_eps(net), **found}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_equals_the_original(block, outputs):
    assert_parity(outputs[block], GOLDEN.outputs[block], atol=1e-6)  # stored rounded to float32


def test_the_predicted_noise_equals_the_original(outputs):
    assert_parity(outputs["emb"], GOLDEN.outputs["emb"])
    assert_parity(outputs["eps"], GOLDEN.outputs["eps"])


def test_the_sinusoid_is_float32_as_in_every_original():
    ours = blocks.timestep_embedding(GOLDEN.inputs["t"].double(), 64)
    assert ours.dtype == torch.float32
    # at t = 981 float64 gives 25 of 64 numbers otherwise; another CPU's float32 one or two
    assert unlike(ours, GOLDEN.outputs["t_emb32"]) <= 6
    assert unlike(GOLDEN.outputs["t_emb64"], GOLDEN.outputs["t_emb32"]) >= 20
    assert_parity(ours, GOLDEN.outputs["t_emb64"], atol=1e-4)


def unlike(table: Tensor, other: Tensor) -> int:
    return int(((table - other).abs() > 1e-6).sum())


def test_with_a_float64_sinusoid_it_equals_the_other_golden_only(outputs, monkeypatch):
    assert max_difference(outputs["eps"], GOLDEN.outputs["eps_temb64"]) > 1e-7
    monkeypatch.setattr(blocks, "timestep_embedding", lambda t, dim: GOLDEN.outputs["t_emb64"])
    assert_parity(golden_eps(golden_unet()), GOLDEN.outputs["eps_temb64"])


@pytest.mark.parametrize(("channels", "groups"), [(4, 32), (9, 32), (13, 16)])
def test_the_predicted_noise_equals_diffusers(channels, groups):
    # 64 channels at least: a group of the norm that is one channel cancels what the timestep adds to it
    widths, heads, context_dim = (64, 128, 192, 192), 4, 24
    theirs = UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=groups,
        cross_attention_dim=context_dim,
        attention_head_dim=heads,  # the number of heads, in spite of its name
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    theirs = randomise(theirs, seed=channels)
    cfg = UNetConfig(
        channels, channels=64, channel_mult=(1, 2, 3, 3), heads=heads, groups=groups, context_dim=context_dim
    )
    ours = UNet(cfg).double().eval()
    load_layout(ours, theirs.state_dict(), UNETS)
    x = torch.randn(2, channels, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    context = torch.randn(2, 5, context_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([981, 3])
    with torch.no_grad():
        assert_parity(ours(x, t, ours.context(context)), theirs(x, t, context).sample)


@pytest.mark.parametrize(
    ("file", "channels", "parameters"),
    [("sd_v1_4_compvis", 4, 859_520_964), ("pbe_model_ckpt_compvis", 9, 859_535_364)],
)
def test_the_full_network_has_exactly_the_tensors_of_the_published_file(file, channels, parameters):
    with torch.device("meta"):
        net = UNet(UNetConfig(in_channels=channels))
    load_into(net, published(file, under=PREFIX), UNET)
    assert len(published(file, under=PREFIX)) == 686
    assert sum(p.numel() for p in net.parameters()) == parameters


def norm_eps(net: UNet, module: type[nn.Module], norm: str) -> None:
    for m in net.modules():
        if isinstance(m, module):
            getattr(m, norm).eps *= 10


def no_output_bias(net: UNet) -> None:
    for m in net.modules():
        if isinstance(m, Attention):
            nn.init.zeros_(m.out.bias)


NETWORK_FAULTS = {
    "first norm of the res blocks: eps 1e-4": lambda net: norm_eps(net, ResBlock, "norm1"),
    "second norm of the res blocks: eps 1e-4": lambda net: norm_eps(net, ResBlock, "norm2"),
    "norm of the transformers: eps 1e-5": lambda net: norm_eps(net, SpatialTransformer, "norm"),
    "last norm: eps 1e-4": lambda net: norm_eps(net, UNet, "norm_out"),
    "no bias at the output of the attention": no_output_bias,
}
CODE_FAULTS = {
    "tanh GELU": (blocks, "GEGLU.forward", 'approximate="none"', 'approximate="tanh"'),
    "gate and value swapped": (blocks, "GEGLU.forward", "value, gate = self", "gate, value = self"),
    "[sin | cos]": (
        blocks,
        "timestep_embedding",
        "[angles.cos(), angles.sin()]",
        "[angles.sin(), angles.cos()]",
    ),
    "frequencies as diffusers' default": (blocks, "timestep_embedding", "/ (dim // 2)", "/ (dim // 2 - 1)"),
    "no SiLU before the timestep's layer": (
        blocks,
        "ResBlock.forward",
        "self.time(F.silu(emb))",
        "self.time(emb)",
    ),
    "the VAE's padding going down": (
        blocks,
        "Downsample.forward",
        "return self.conv(x)",
        "return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)",
    ),
    "bilinear going up": (blocks, "Upsample.forward", 'mode="nearest"', 'mode="bilinear"'),
    "self-attention without its norm": (blocks, "SpatialTransformer.forward", "y = self.norm1(h)", "y = h"),
    "the skip before the stream": (unet, "UNet.forward", "[x, skips.pop()]", "[skips.pop(), x]"),
    "skips in the order they were made": (
        unet,
        "UNet.forward",
        "skips.pop()]",
        "skips.pop(-1 if i else -2)]",
    ),
}
NAME_FAULTS = {
    "norm1 and norm2 of the transformers": ("norm1.*", "norm2.*"),
    "keys and values": ("attn2.to_k.*", "attn2.to_v.*"),
    "keys and queries": ("attn1.to_k.*", "attn1.to_q.*"),
    "norm2 and norm3 of the transformers": ("norm2.*", "norm3.*"),
}


@pytest.mark.parametrize("fault", NETWORK_FAULTS)
def test_parity_notices_a_wrong_number(fault, golden_sinusoid):
    net = golden_unet()
    with torch.no_grad():
        NETWORK_FAULTS[fault](net)
    assert max_difference(golden_eps(net), GOLDEN.outputs["eps"]) > 1e-6


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices_a_wrong_line(fault, golden_sinusoid, monkeypatch):
    plant(monkeypatch, *CODE_FAULTS[fault])
    assert max_difference(golden_eps(golden_unet()), GOLDEN.outputs["eps"]) > 1e-6


@pytest.mark.parametrize("fault", NAME_FAULTS)
def test_parity_notices_swapped_names(fault, golden_sinusoid):
    net = golden_unet(swapped(TABLE, *NAME_FAULTS[fault]))
    assert max_difference(golden_eps(net), GOLDEN.outputs["eps"]) > 1e-6


def test_a_context_projected_once_serves_every_step():
    net, i = golden_unet(), GOLDEN.inputs
    context = net.context(i["context"])
    copies = [(k.clone(), v.clone()) for k, v in context]
    before = {name: tensor.clone() for name, tensor in i.items()}
    with torch.no_grad():
        for t in (981, 500, 1):
            at = torch.full((2,), t)
            assert torch.equal(net(i["x"], at, context), net(i["x"], at, net.context(i["context"])))
    assert all(
        torch.equal(a, b)
        for kv, copy in zip(context, copies, strict=True)
        for a, b in zip(kv, copy, strict=True)
    )
    assert all(torch.equal(i[name], tensor) for name, tensor in before.items())


def test_samples_of_a_batch_do_not_see_each_other(golden_sinusoid):
    net, i = golden_unet(), GOLDEN.inputs
    with torch.no_grad():
        alone = [
            net(i["x"][n : n + 1], i["t"][n : n + 1], net.context(i["context"][n : n + 1])) for n in range(2)
        ]
    assert_parity(torch.cat(alone), GOLDEN.outputs["eps"])


def test_inject_sees_the_stream_before_each_decoder_block_and_replaces_it(golden_sinusoid):
    net, i, seen = golden_unet(), GOLDEN.inputs, {}

    def inject(block: int, h: Tensor) -> Tensor:
        seen[block] = h
        return 2 * h if block == 5 else h

    with torch.no_grad():
        eps = net(i["x"], i["t"], net.context(i["context"]), inject)
    assert_parity(seen[0], GOLDEN.outputs["mid"], atol=1e-6)
    for block in range(1, 6):
        assert_parity(seen[block], GOLDEN.outputs[f"out_{block - 1}"], atol=1e-6)
    assert max_difference(eps, GOLDEN.outputs["eps"]) > 1e-2


def test_a_fresh_network_predicts_zero_noise():
    net = UNet(UNetConfig(4, channels=32, heads=2, context_dim=8))
    assert not net(torch.randn(1, 4, 8, 8), torch.tensor([5]), net.context(torch.randn(1, 3, 8))).any()


def test_bfloat16_tells_neighbouring_timesteps_apart():
    net = blocks.TimeEmbed(UNetConfig()).bfloat16()
    emb = net(torch.tensor([980, 981]))  # bfloat16 has no 981
    assert emb.dtype == torch.bfloat16 and not torch.equal(emb[0], emb[1])


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="width 48"):
        UNetConfig(channels=48)
    with pytest.raises(ValueError, match="width 320 .* 6 heads"):
        UNetConfig(heads=6)


def golden_table(t: Tensor, dim: int) -> Tensor:
    """The golden's own sinusoid: float32 exp and cos differ in the last bit between CPUs."""
    return GOLDEN.outputs["t_emb32"][[GOLDEN.inputs["t"].tolist().index(n) for n in t.tolist()]]


@pytest.fixture
def golden_sinusoid(monkeypatch):
    monkeypatch.setattr(blocks, "timestep_embedding", golden_table)


def golden_unet(table: Table = TABLE) -> UNet:
    c = GOLDEN.config
    cfg = UNetConfig(
        in_channels=c["in_channels"],
        channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        attention_levels=(0, 1),  # downsampling factors 1 and 2 in the original's words
        res_blocks=c["num_res_blocks"],
        heads=c["num_heads"],
        context_dim=c["context_dim"],
    )
    net = UNet(cfg).double().eval()
    load_into(net, {name: tensor.clone() for name, tensor in GOLDEN.weights.items()}, table)
    return net


@torch.no_grad()
def golden_eps(net: UNet) -> Tensor:
    i = GOLDEN.inputs
    return net(i["x"], i["t"], net.context(i["context"]))


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def swapped(table: Table, one: str, other: str) -> Table:
    """The table with our names of the rows that end in `one` and in `other` exchanged."""
    pairs = {row: row.removesuffix(one) + other for row in table if row.endswith(one)}
    pairs |= {b: a for a, b in pairs.items()}
    assert pairs
    return {row: table[pairs.get(row, row)] for row in table}
