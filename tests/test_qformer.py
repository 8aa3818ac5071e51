"""Q-Former against LAVIS' own numbers (goldens `qformer`, `blip2_cls`, `blip2_cir`) and transformers' BLIP-2."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise, swap
from tests.published import published
from tests.test_vit import without_key_bias
from unifashion import UserError, losses, qformer
from unifashion.config import FULL
from unifashion.qformer import QFormer, QFormerConfig
from unifashion.vit import ViT, ViTConfig
from weights.qformer import QFORMER, QFORMERS, VITS
from weights.rename import Table, load_into, load_layout, under
from weights.vit import VIT

ATOL = 1e-12  # BERT's eps is as small as that: ten times it moves the outputs by 1e-11, noise by 4e-15

# what LAVIS computes with the network


def test_queries_and_an_image_equal_lavis_layer_by_layer():
    golden, model = lavis()
    outputs = record(model.layers)
    z, text = model(golden.inputs["image_embeds"])
    assert text is None
    assert_parity(model.embed_norm(model.query_tokens), golden.outputs["query_only_layer_0"][:1])
    for i, x in enumerate(outputs):
        assert_parity(x, golden.outputs[f"query_only_layer_{i + 1}"], ATOL)
    assert_parity(z, golden.outputs["query_only"], ATOL)
    assert_parity(model.embed_image(z), golden.outputs["image_feats"])


def test_text_alone_equals_lavis():
    golden, model = lavis()
    z, text = model(ids=golden.inputs["text_ids"], mask=golden.inputs["text_mask"])
    assert z is None
    assert_parity(text, golden.outputs["text_only"], ATOL)
    assert_parity(model.embed_text(text), golden.outputs["text_feat"])


def test_queries_text_and_image_together_equal_lavis():
    golden, model = lavis()
    z, text = read(model, golden)
    assert_parity(torch.cat([z, text], dim=1), golden.outputs["multi"], ATOL)
    assert_parity(model.embed_image(z), golden.outputs["fusion_image_feats"])
    assert_parity(model.embed_text(text), golden.outputs["fusion_text_feat"])
    assert_parity(model.itm_head(z).mean(1), golden.outputs["itm_logits"])


def test_retrieval_of_unifashion_phase_1_equals_the_official_code():
    golden, model = blip2("blip2_cls")
    image, text = embeddings(model, golden)
    sim = torch.einsum("iqd,td->itq", image, text).amax(-1)
    temp = model["qformer"].temp
    assert_parity(sim / temp, golden.outputs["sim_i2t"])
    assert_parity(losses.itc(sim, temp), golden.outputs["loss_itc"])
    # `similarity` is float32 on purpose: float32's noise, over a temperature of 0.2
    assert_parity(losses.itc(losses.similarity(image, text), temp), golden.outputs["loss_itc"], atol=1e-5)


def test_matching_of_unifashion_phase_1_equals_the_official_code():
    golden, model = blip2("blip2_cls")
    image, ids, mask = features(model, golden), golden.inputs["text_ids"], golden.inputs["text_mask"]
    wrong_image, wrong_text = golden.outputs["neg_image_idx"], golden.outputs["neg_text_idx"]
    everything = torch.arange(len(ids))
    text_rows = torch.cat([everything, everything, wrong_text])
    image_rows = torch.cat([everything, wrong_image, everything])
    z, _ = model["qformer"](image[image_rows], ids[text_rows], mask[text_rows])
    logits = model["qformer"].itm_head(z).mean(1)
    assert_parity(logits, golden.outputs["itm_logits"])
    assert_parity(
        losses.itm(logits[:4], logits[4:]), golden.outputs["loss_itm"], atol=1e-6
    )  # in float32 on purpose


def test_composed_retrieval_of_unifashion_phase_2_equals_the_official_code():
    golden, model = blip2("blip2_cir")
    former, ids, mask = model["qformer"], golden.inputs["text_ids"], golden.inputs["text_mask"]
    reference, target = features(model, golden), features(model, golden, "target")
    assert_parity(reference, golden.outputs["ref_raw"])
    assert_parity(target, golden.outputs["gallery_raw"])
    gallery = former.embed_image(former(target)[0])
    assert_parity(gallery, golden.outputs["gallery_feats"])
    _, caption = former(ids=golden.inputs["target_caption_ids"], mask=golden.inputs["target_caption_mask"])
    caption = former.embed_text(caption)
    assert_parity(caption, golden.outputs["caption_feats"])
    _, fused = former(reference, ids, mask)
    query = former.embed_text(fused)
    score = torch.einsum("td,iqd->tiq", query, gallery).amax(-1)
    assert_parity(score, golden.outputs["score_image"])
    assert_parity(score + query @ caption.T, golden.outputs["score_all"])


def test_given_queries_equal_the_official_codes_second_set():
    """In training, not in inference, the official code reads targets with `prompt_tokens` in place of `query_tokens`."""
    golden, model = blip2("blip2_cir")
    former, ids, mask = model["qformer"], golden.inputs["text_ids"], golden.inputs["text_mask"]
    caption_ids, caption_mask = golden.inputs["target_caption_ids"], golden.inputs["target_caption_mask"]
    reference, target = features(model, golden), features(model, golden, "target")
    prompt = model["prompt_tokens"].weight.expand(len(ids), -1, -1)
    query = former.embed_text(former(reference, ids, mask)[1])
    z, _ = former(target, queries=prompt)
    sim = torch.einsum("iqd,td->itq", former.embed_image(z), query).amax(-1)
    assert_parity(sim / former.temp, golden.outputs["sim_i2t"])
    assert_parity(losses.itc(sim, former.temp), golden.outputs["loss_itc"])
    wrong_image, wrong_text = golden.outputs["neg_image_idx"], golden.outputs["neg_text_idx"]
    z, _ = former(
        torch.cat([target, target[wrong_image], target]),
        torch.cat([caption_ids, caption_ids, ids[wrong_text]]),
        torch.cat([caption_mask, caption_mask, mask[wrong_text]]),
        queries=prompt.repeat(3, 1, 1),
    )
    assert_parity(former.itm_head(z).mean(1), golden.outputs["itm_logits"])


def test_image_and_text_equal_transformers():
    theirs, eye, ours = transformers_pair()
    image, ids, mask = batch()
    vision = ours.ln_vision(eye(image))
    out = theirs(pixel_values=image, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    assert_parity(vision, out.vision_model_output.last_hidden_state)
    z, text = ours(vision, ids, mask)
    assert_parity(torch.cat([z, text], dim=1), out.text_model_output.last_hidden_state)
    assert_parity(ours.itm_head(z).mean(1), out.logits_per_image)
    out = theirs(pixel_values=image, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    assert_parity(ours.embed_image(ours(vision)[0]), out.image_embeds)
    assert_parity(ours.embed_text(ours(ids=ids, mask=mask)[1]), out.text_embeds)


# what follows from it


def test_queries_do_not_see_padding():
    golden, model = lavis()
    z, _ = read(model, golden)
    ids = torch.where(golden.inputs["text_mask"].bool(), golden.inputs["text_ids"], 17)
    other, _ = model(golden.inputs["image_embeds"], ids, golden.inputs["text_mask"])
    assert torch.equal(z, other)


def test_dropout_acts_in_training_and_not_in_evaluation(monkeypatch: pytest.MonkeyPatch):
    golden, model = lavis()
    image = golden.inputs["image_embeds"]
    assert torch.equal(model(image)[0], model(image)[0])
    model.train()
    asked = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: asked.append((p, training)) or x)
    assert not torch.equal(model(image)[0], model(image)[0])  # what still differs is within the attention
    # once per forward on the embeddings, and after 4 self-attentions, 2 cross-attentions and 4 feed-forwards
    assert asked == [(0.1, True)] * 2 * (1 + 4 + 2 + 4)


def test_the_inputs_are_unchanged():
    golden, model = lavis()
    before = {name: tensor.clone() for name, tensor in golden.inputs.items()}
    read(model, golden)
    assert all(torch.equal(before[name], golden.inputs[name]) for name in before)


def test_the_full_model_is_the_published_file():
    with torch.device("meta"):
        model = QFormer(FULL.qformer)
    load_into(model, published("lavis_blip2_pretrained"), QFORMER)
    assert len(model.state_dict()) == 338  # 346 in the file, less 7 of the language head and position_ids
    assert sum(p.numel() for p in model.parameters()) == 186_082_819


# faults

CODE_FAULTS = {
    "eps of the embeddings x10": ("QFormer", "self.embed_norm = nn.LayerNorm(cfg.dim, eps=1e-12)", "self.embed_norm = nn.LayerNorm(cfg.dim, eps=1e-11)"),
    "eps of attention x10": ("Attention", "self.norm = nn.LayerNorm(dim, eps=1e-12)", "self.norm = nn.LayerNorm(dim, eps=1e-11)"),
    "eps of the feed-forwards x10": ("MLP", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-12)", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-11)"),
    "tanh GELU": ("MLP.forward", 'approximate="none"', 'approximate="tanh"'),
    "text positions after the queries": ("QFormer.forward", "weight[: ids.shape[1]]", "weight[self.cfg.queries :][: ids.shape[1]]"),
    "queries with positions": ("QFormer.forward", "self.query_tokens.expand(len(image), -1, -1)", "self.query_tokens.expand(len(image), -1, -1) + self.position_embeddings.weight[:5]"),
    "mask ignored": ("Layer.forward", "self.attn(x, x, mask)", "self.attn(x, x)"),
    "text masked, queries not let through": ("QFormer.forward", "(n_queries, 0), value=True", "(n_queries, 0), value=False"),
    "text sees the image": ("Layer.forward", "queries = self.cross(queries, image)", "queries, text = self.cross(queries, image), self.cross(text, image)"),
    "text fed forward as queries": ("Layer.forward", "[self.text_mlp(text)]", "[self.query_mlp(text)]"),
}  # fmt: skip

TABLE_FAULTS = {
    "text and query feed-forwards swapped": ("text_mlp", "query_mlp"),
    "queries and keys swapped": ("attn.q", "attn.k"),
    "keys and values of the image swapped": ("cross.k", "cross.v"),
    "norms of attention and feed-forward swapped": ("attn.norm", "text_mlp.norm"),
    "projections swapped": ("vision_proj", "text_proj"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, qformer, *CODE_FAULTS[fault])
    golden, model = lavis()
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(torch.cat(read(model, golden), dim=1), golden.outputs["multi"], ATOL)


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    golden, model = lavis(swap(QFORMER, *TABLE_FAULTS[fault]))
    z, text = read(model, golden)
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(torch.cat([z, text], dim=1), golden.outputs["multi"], ATOL)
        assert_parity(model.embed_image(z), golden.outputs["fusion_image_feats"])


def test_loading_notices_cross_attention_in_odd_layers(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, qformer, "QFormer", "cross=i % cfg.cross_every == 0", "cross=i % cfg.cross_every == 1")
    with pytest.raises(UserError, match=r"for layers\.1\.cross"):
        lavis()


def test_parity_notices_the_vits_eps_in_ln_vision():
    golden, model = blip2("blip2_cir")
    model["qformer"].ln_vision.eps = 1e-6  # transformers has it so
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(features(model, golden), golden.outputs["ref_raw"])


# helpers


def lavis(table: Table = QFORMER) -> tuple[goldens.Golden, QFormer]:
    golden = goldens.load("qformer")
    c = golden.config
    cfg = QFormerConfig(
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        max_text=c["text_len"],
        queries=c["query_length"],
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        cross_every=c["cross_attention_freq"],
        vision_dim=c["encoder_width"],
        embed_dim=c["embed_dim"],
    )
    model = qformer.QFormer(cfg).double().eval()
    ln_vision = {
        f"ln_vision.{name}": torch.ones(cfg.vision_dim) for name in ("weight", "bias")
    }  # not in this case
    load_into(model, golden.weights | ln_vision, table)
    return golden, model


def blip2(case: str) -> tuple[goldens.Golden, nn.ModuleDict]:
    """UniFashion's own classes: ViT and Q-Former in one checkpoint."""
    golden = goldens.load(case)
    c = golden.config
    eye = ViTConfig(
        image_size=tuple(c["img_size"]),
        patch_size=c["patch_size"],
        dim=c["vit_dim"],
        depth=c["vit_depth"],
        heads=c["vit_heads"],
        mlp_dim=int(c["vit_dim"] * c["mlp_ratio"]),
    )
    cfg = QFormerConfig(
        vocab_size=len(c["vocab"]) + 1,
        max_positions=c["max_position_embeddings"],
        max_text=c["max_txt_len"],
        queries=c["num_query_token"],
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        cross_every=c["cross_attention_freq"],
        vision_dim=c["vit_dim"],
        embed_dim=c["embed_dim"],
    )
    model = {"vit": ViT(eye), "qformer": QFormer(cfg)}
    table = under("visual_encoder.", "vit.", VIT) | under("", "qformer.", QFORMER)
    table |= {"query_proj.*": None, "caption_proj.*": None}  # the official code computes nothing with them
    if "prompt_tokens" in golden.weights:  # the official code's second set of queries, for targets
        model["prompt_tokens"] = Queries(cfg)
        table |= {"prompt_tokens": "prompt_tokens.weight"}
    model = nn.ModuleDict(model).double().eval()
    load_into(model, golden.weights, table)
    return golden, model


class Queries(nn.Module):
    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, cfg.queries, cfg.dim))


def read(model: QFormer, golden: goldens.Golden) -> tuple[Tensor, Tensor]:
    return model(golden.inputs["image_embeds"], golden.inputs["text_ids"], golden.inputs["text_mask"])


def features(model: nn.ModuleDict, golden: goldens.Golden, image: str = "image") -> Tensor:
    return model["qformer"].ln_vision(model["vit"](golden.inputs[image]))


def embeddings(model: nn.ModuleDict, golden: goldens.Golden) -> tuple[Tensor, Tensor]:
    former = model["qformer"]
    z, _ = former(features(model, golden))
    _, text = former(ids=golden.inputs["text_ids"], mask=golden.inputs["text_mask"])
    return former.embed_image(z), former.embed_text(text)


def record(layers: nn.ModuleList) -> list[Tensor]:
    outputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    return outputs


def transformers_pair() -> tuple[Blip2ForImageTextRetrieval, ViT, QFormer]:
    theirs = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config={
                "hidden_size": 40,
                "intermediate_size": 56,
                "num_hidden_layers": 2,
                "num_attention_heads": 5,
                "image_size": 28,
                "patch_size": 14,
            },
            qformer_config={
                "vocab_size": 61,
                "hidden_size": 36,
                "intermediate_size": 50,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "encoder_hidden_size": 40,
                "max_position_embeddings": 20,
                "use_qformer_text_input": True,
            },
            image_text_hidden_size=22,
            num_query_tokens=5,
        )
    )
    randomise(theirs, seed=0)
    theirs.vision_model.post_layernorm.eps = 1e-5  # LAVIS' ln_vision; transformers gives it the ViT's 1e-6
    eye = ViT(ViTConfig(image_size=(28, 28), patch_size=14, dim=40, depth=2, heads=5, mlp_dim=56)).double()
    without_key_bias(theirs)
    load_layout(eye, theirs.state_dict(), VITS)
    cfg = QFormerConfig(
        vocab_size=61,
        max_positions=20,
        max_text=11,
        queries=5,
        dim=36,
        depth=4,
        heads=4,
        mlp_dim=50,
        vision_dim=40,
        embed_dim=22,
    )
    ours = QFormer(cfg).double().eval()
    load_layout(ours, theirs.state_dict(), QFORMERS)
    return theirs, eye, ours


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, 28, 28, dtype=torch.float64, generator=generator)
    ids = torch.randint(1, 61, (3, 11), generator=generator)
    return image, ids, torch.arange(11) < torch.tensor([11, 7, 4])[:, None]
