"""The garment encoder and its U-Net against StableVITON (golden case stableviton), and how its whole file is read."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.faults import plant
from tests.goldens import load
from tests.parity import assert_parity, randomise
from tests.published import published
from unifashion import UserError, blocks, garment, unet
from unifashion.blocks import UNetConfig
from unifashion.garment import GarmentEncoder
from unifashion.unet import UNet
from unifashion.vae import VAE, VAEConfig
from weights.garment import STABLEVITON, load_stableviton, with_control_convs
from weights.rename import load_into

GOLDEN, VAE_GOLDEN = load("stableviton"), load("vae")
CONFIG = UNetConfig(13, channels=32, channel_mult=(1, 2, 2, 2), heads=4, context_dim=24)
VAE_CONFIG = VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1)
TABLE = {row: ours for row, ours in STABLEVITON.items() if not (ours or "").startswith("vae.")}
X = torch.cat([GOLDEN.inputs["z_t"], GOLDEN.inputs["first_stage_cond"]], dim=1)
T, HINT, CONTEXT = GOLDEN.inputs["t"], GOLDEN.inputs["hint"], GOLDEN.outputs["context"]
MANY = GOLDEN.inputs["context_multi"]  # six tokens: with one, queries and keys do nothing


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    """Ours, under the names of the golden: the encoder whole, and the stream behind each of its attention blocks."""
    net, encoder, null = golden_parts()
    found = {}

    def inject(features: list[Tensor], i: int, h: Tensor) -> Tensor:
        found[f"warp_out_{i - 3}"] = encoder.inject(features, None, i, h)
        return found[f"warp_out_{i - 3}"]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "timestep_embedding", golden_table)
        emb, context = encoder.time_embed(T), encoder.context
        for name, tokens in (("control", CONTEXT), ("control_multi", MANY)):
            kv = iter(context(tokens))
            features = encoder.encoder.down(X, emb, kv, encoder.hint_in(HINT))
            features.append(encoder.encoder.middle(features[-1], emb, kv))
            found |= {f"{name}_{i}": feature for i, feature in enumerate(features)}
        features = encoder(X, T, context(CONTEXT), HINT)
        found["eps"] = net(X, T, net.context(CONTEXT), partial(inject, features))
        found["eps_multi"] = predict(net, encoder, MANY)
        found["eps_uncond"] = predict(net, encoder, null.expand(2, -1, -1))
    return found


CONTROLS = [f"control_{i}" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)]  # 1 is not in the golden
WARPS = [f"warp_out_{i}" for i in (0, 1, 2, 3, 4, 5, 8)]  # 6 and 7 are not


@pytest.mark.parametrize("block", [*CONTROLS, "control_multi_12", *WARPS])
def test_every_block_equals_the_original(block, outputs):
    assert_parity(outputs[block], GOLDEN.outputs[block], atol=1e-6)  # stored as float32


@pytest.mark.parametrize("context", ["eps", "eps_multi", "eps_uncond"])
def test_the_predicted_noise_equals_the_original(context, outputs):
    assert_parity(outputs[context], GOLDEN.outputs[context])


def test_its_sinusoid_is_float32_as_in_the_original(outputs, monkeypatch):
    ours = blocks.timestep_embedding(T, 32)
    assert ours.dtype == torch.float32 and ((ours - golden_table(T, 32)).abs() > 1e-7).sum() <= 3
    assert max_difference(outputs["eps"], GOLDEN.outputs["eps_temb64"]) > 1e-7
    freqs = torch.exp(-math.log(10000) * torch.arange(16, dtype=torch.float64) / 16)
    table = torch.cat([(T[:, None] * freqs).cos(), (T[:, None] * freqs).sin()], dim=-1)
    monkeypatch.setattr(blocks, "timestep_embedding", lambda t, dim: table)
    net, encoder, _ = golden_parts()
    assert_parity(predict(net, encoder, CONTEXT), GOLDEN.outputs["eps_temb64"])


@torch.no_grad()
def test_only_the_nine_blocks_that_are_read_are_run(outputs, golden_sinusoid):
    _, encoder, _ = golden_parts()
    for block in [*encoder.encoder.blocks[9:], encoder.encoder.middle_in, encoder.encoder.middle_out]:
        block.register_forward_pre_hook(lambda *_: pytest.fail("nothing reads its output"))
    features = encoder(X, T, encoder.context(CONTEXT), HINT)
    assert len(features) == 9
    assert all(torch.equal(feature, outputs[f"control_{i}"]) for i, feature in enumerate(features))


def test_a_null_vector_may_stand_once_or_for_every_token():
    net, encoder, null = golden_parts()
    once, often = (predict(net, encoder, null.expand(2, n, -1)) for n in (1, 6))
    assert_parity(once, often)


CODE_FAULTS = {
    "features of two blocks exchanged": (
        garment,
        "GarmentEncoder.inject",
        "features[-1 - j]",
        "features[{3: 7, 4: 8}.get(i, 11 - i)]",
    ),
    "the garment goes into the skip, not the stream": (
        unet,
        "UNet.forward",
        "                x = inject(i, x)",
        "                if skips[-1].shape == x.shape: skips[-1] = inject(i, skips[-1])",
    ),
    "the garment goes in one block late": (
        garment,
        "GarmentEncoder.inject",
        "if i < self.first:",
        "if i <= self.first:",
    ),
    "the attention block's own residual only": (
        garment,
        "GarmentEncoder.inject",
        "return h + (residual",
        "return (residual",
    ),
    "no hint": (blocks, "Encoder.down", "self.blocks[0](x) + hint", "self.blocks[0](x)"),
    "the hint a second time, after the first res block": (
        blocks,
        "Encoder.down",
        "skips.append(block(x, emb, context) if",
        "skips.append(block(x, emb, context) + (hint if len(skips) == 1 else 0) if",
    ),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices_a_wrong_line(fault, golden_sinusoid, monkeypatch):
    plant(monkeypatch, *CODE_FAULTS[fault])
    net, encoder, _ = golden_parts()
    assert max_difference(predict(net, encoder, MANY), GOLDEN.outputs["eps_multi"]) > 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("warp_flow_blks.0.", "warp_flow_blks.1."),
        ("warp_zero_convs.3.", "warp_zero_convs.2."),
        ("control_model.time_embed.", "model.diffusion_model.time_embed."),
    ],
)
def test_parity_notices_exchanged_weights(one, other, golden_sinusoid):
    names = [name for name in GOLDEN.weights if one in name]
    pairs = {name: name.replace(one, other) for name in names}
    pairs |= {b: a for a, b in pairs.items()}
    net, encoder, _ = golden_parts({name: GOLDEN.weights[pairs.get(name, name)] for name in GOLDEN.weights})
    assert max_difference(predict(net, encoder, MANY), GOLDEN.outputs["eps_multi"]) > 1e-6


def test_a_fresh_garment_encoder_changes_nothing_bit_for_bit():
    net, encoder = randomise(UNet(CONFIG), seed=0), GarmentEncoder(CONFIG).double()
    with torch.no_grad():
        alone = net(X, T, net.context(MANY))
    assert torch.equal(predict(net, encoder, MANY), alone)
    randomise(encoder.hint_in, seed=1)
    assert torch.equal(predict(net, encoder, MANY), alone)  # the zero convolutions alone close it
    assert encoder.untrained
    for opened in ("zero_convs", "control_convs"):
        encoder = GarmentEncoder(CONFIG).double()
        randomise(getattr(encoder, opened), seed=2)
        assert max_difference(predict(net, encoder, MANY), alone) > 1e-3 and not encoder.untrained


@torch.no_grad()
def test_a_control_convolution_adds_the_features_of_its_own_place_and_block():
    _, encoder, _ = golden_parts()
    features = encoder(X, T, encoder.context(MANY), HINT)
    h = {i: torch.zeros(2, *GOLDEN.outputs[f"warp_out_{i - 3}"].shape[1:]).double() for i in (3, 6, 11)}
    before = {i: encoder.inject(features, None, i, at) for i, at in h.items()}
    randomise(encoder.control_convs, seed=3)
    for i, at in h.items():
        w, b = encoder.control_convs[i - 3].weight[:, :, 0, 0], encoder.control_convs[i - 3].bias
        added = torch.einsum("oc,bcyx->boyx", w, features[11 - i]) + b[:, None, None]
        torch.testing.assert_close(encoder.inject(features, None, i, at) - before[i], added)


@torch.no_grad()
def test_attention_carries_the_garment_over_on_the_levels_that_have_it_and_addition_on_all():
    cfg = UNetConfig(13, channels=32, channel_mult=(1, 2, 1), attention_levels=(0,), heads=4, context_dim=24)
    encoder = randomise(GarmentEncoder(cfg), seed=0)
    features = encoder(X, T, encoder.context(MANY), HINT)
    called: list[int] = []
    for n, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, n=n: called.append(n))
    net = randomise(UNet(cfg), seed=1)

    def inject(i: int, h: torch.Tensor) -> torch.Tensor:
        dressed = encoder.inject(features, None, i, h)
        if i in (3, 4, 5):  # level 1
            assert torch.equal(dressed, h + encoder.control_convs[i - 3](features[8 - i])) and not called
        return dressed

    net(X, T, net.context(MANY), inject)
    assert len(encoder.control_convs) == 6 and called == [0, 1, 2]


@torch.no_grad()
def test_started_from_the_unet_it_is_its_encoder_and_its_sense_of_time():
    net, encoder = randomise(UNet(CONFIG), seed=0), randomise(GarmentEncoder(CONFIG), seed=1)
    encoder.start_from(net.encoder, net.time_embed)
    encoder.hint_in.apply(blocks.zero)
    kv = iter(net.context(MANY))
    theirs = net.encoder.down(X, net.time_embed(T), kv)
    ours = encoder(X, T, encoder.context(MANY), HINT)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))


def test_a_fresh_garment_encoder_does_not_see_the_garment_but_learns_to():
    encoder = GarmentEncoder(CONFIG).double()
    features = encoder(X, T, encoder.context(MANY), HINT)
    blank = encoder(X, T, encoder.context(MANY), torch.zeros_like(HINT))
    assert all(torch.equal(a, b) for a, b in zip(features, blank, strict=True))
    features[0].square().sum().backward()
    assert encoder.hint_in.weight.grad.abs().max() > 0


def test_keep_zero_takes_the_garment_from_that_sample_only():
    net, encoder, _ = golden_parts()
    with torch.no_grad():
        without = net(X, T, net.context(MANY))
    dressed = predict(net, encoder, MANY)
    first_off = predict(net, encoder, MANY, keep=torch.tensor([0.0, 1.0]).double())
    assert torch.equal(first_off[0], without[0])
    assert torch.equal(first_off[1], dressed[1])
    assert (dressed - without).abs().amax((1, 2, 3)).min() > 1e-2


@torch.no_grad()
def test_a_context_projected_once_serves_every_step_and_inputs_stay_as_they_were():
    net, encoder, _ = golden_parts()
    for_net, for_encoder = net.context(MANY), encoder.context(MANY)
    held = [X, T, HINT, MANY, *(tensor for kv in [*for_net, *for_encoder] for tensor in kv)]
    copies = [tensor.clone() for tensor in held]
    for t in (981, 1):
        at = torch.full((2,), t)
        features = encoder(X, at, for_encoder, HINT)
        cached = net(X, at, for_net, partial(encoder.inject, features, None))
        features = encoder(X, at, encoder.context(MANY), HINT)
        assert torch.equal(cached, net(X, at, net.context(MANY), partial(encoder.inject, features, None)))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(held, copies, strict=True))


def test_the_full_networks_have_exactly_the_tensors_of_the_published_file():
    with torch.device("meta"):
        net, encoder, vae = UNet(UNetConfig()), GarmentEncoder(UNetConfig()), VAE(VAEConfig())
        parts = nn.ModuleDict({"unet": net, "garment": encoder, "vae": vae})
        parts.register_parameter("null_context", nn.Parameter(torch.empty(1, 1, 768)))
    file = published("stableviton_VITONHD")
    load_into(parts, with_control_convs(file, encoder), STABLEVITON)
    position_ids = "cond_stage_model.transformer.vision_model.embeddings.position_ids"
    pose_file = {**file, position_ids: torch.empty(1, 257)}  # as VITONHD_PBE_pose.ckpt
    load_into(parts, with_control_convs(pose_file, encoder), STABLEVITON)

    in_decoder = count(encoder.blocks) + count(encoder.zero_convs)
    assert count(net) == 859_546_884
    assert count(net) + in_decoder == 1_039_325_444
    assert count(encoder) - in_decoder - count(encoder.control_convs) == 348_750_720
    assert len(encoder.blocks) == len(encoder.control_convs) == 9
    assert len([name for name in file if name.startswith("model.diffusion_model.")]) == 938
    assert len([name for name in file if name.startswith("control_model.")]) == 300
    assert len(file) == 1957


def test_a_whole_file_is_read_into_the_three_parts_and_the_null_vector(tmp_path, golden_sinusoid):
    net, encoder, vae = UNet(CONFIG).double(), GarmentEncoder(CONFIG).double(), VAE(VAE_CONFIG).double()
    null = load_stableviton(write(tmp_path, whole_file()), net, encoder, vae, torch.float64)
    assert torch.equal(null, GOLDEN.weights["learnable_vector"])
    assert not any(p.any() for p in encoder.control_convs.parameters())
    assert_parity(predict(net, encoder, MANY), GOLDEN.outputs["eps_multi"])
    assert torch.equal(vae.decoder.conv_out.weight, VAE_GOLDEN.weights["decoder.conv_out.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "learnable_vector",
        "model.diffusion_model.warp_zero_convs.4.bias",
        "control_model.middle_block.0.in_layers.2.bias",
        "first_stage_model.quant_conv.bias",
    ],
)
def test_a_whole_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(name, tmp_path):
    parts = UNet(CONFIG), GarmentEncoder(CONFIG), VAE(VAE_CONFIG)
    with pytest.raises(UserError, match=f"{name}_2: (no row of the table|the model has no such layer)"):
        load_stableviton(write(tmp_path, {**whole_file(), f"{name}_2": torch.ones(1)}), *parts)
    less = {key: tensor for key, tensor in whole_file().items() if key != name}
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_stableviton(write(tmp_path, less), *parts)


def whole_file() -> dict[str, Tensor]:
    """A small VITONHD.ckpt: the two goldens, and some of what we leave out."""
    left_out = ["betas", "logvar", "lastzc.bias", "cond_stage_model.final_ln.weight", "posterior_mean_coef1"]
    return {
        **GOLDEN.weights,
        **{f"first_stage_model.{name}": tensor for name, tensor in VAE_GOLDEN.weights.items()},
        **{name: torch.ones(3) for name in left_out},
    }


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": tensors, "global_step": 7}, folder / "VITONHD.ckpt")
    return folder / "VITONHD.ckpt"


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def golden_parts(weights: dict[str, Tensor] = GOLDEN.weights) -> tuple[UNet, GarmentEncoder, Tensor]:
    """The U-Net, the garment encoder and the null vector (1,1,24) with the golden's weights."""
    parts = nn.ModuleDict({"unet": UNet(CONFIG), "garment": GarmentEncoder(CONFIG)}).double().eval()
    parts.register_parameter("null_context", nn.Parameter(torch.empty(1, 1, 24, dtype=torch.float64)))
    checkpoint = {name: tensor.clone() for name, tensor in weights.items()}
    load_into(parts, with_control_convs(checkpoint, parts["garment"]), TABLE)
    return parts["unet"], parts["garment"], parts.null_context


def golden_table(t: Tensor, dim: int) -> Tensor:
    """
    The golden's own sinusoid of timesteps 961 and 21, 32 wide.

    Float32 exp and cos differ in the last bit between CPUs, and the golden stores no table. It is the correctly rounded
    one but for three numbers: with these the noise agrees to 1e-14.
    """
    freqs = (-math.log(10000) * torch.arange(16, dtype=torch.float32) / 16).double().exp().float()
    angles = (T.float()[:, None] * freqs).double()
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    bits = table.view(torch.int32)
    bits[0, 10] -= 1
    bits[0, 24] += 1
    bits[1, 5] += 1
    return table[[T.tolist().index(n) for n in t.tolist()]]


@pytest.fixture
def golden_sinusoid(monkeypatch):
    monkeypatch.setattr(blocks, "timestep_embedding", golden_table)


@torch.no_grad()
def predict(net: UNet, encoder: GarmentEncoder, context: Tensor, keep: Tensor | None = None) -> Tensor:
    features = encoder(X, T, encoder.context(context), HINT)
    return net(X, T, net.context(context), partial(encoder.inject, features, keep))


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()
