"""What is learned, an objective at a time: from a batch of what the frozen networks said to the paper's losses.

cross      ITC + ITM of a picture and its text             Eq. 2-5
caption    ITG: the picture's text from Z_I                Eq. 6
generate   q2I: the picture from Z_I                       Eq. 7
composed   reference + modification text -> target         Eq. 9-13
tryon      q2I: a person in a garment                      Eq. 7, Fig. 3

Each objective is a pair: `encode_...` runs the frozen networks, so its output may be cached (`feed.batches`); the function of
the objective's name returns {loss name: scalar}. While the Q-Former trains, a batch carries the ViT's "features" before
ln_vision, which trains too (`seen` is what comes after it); where the Q-Former is frozen, it carries "z" itself. `rng` has the
batch's random numbers; `hardness` in [0,1] scales the similarities that ITM's negatives are drawn by, 0 uniform, 1 as BLIP-2.
Each of several processes has its share of the batch: contrastive losses gather over them.
"""

import torch
from torch import Tensor

from unifashion import diffusion, losses
from unifashion.model import UniFashion
from unifashion.parallel import gather, local_rows
from unifashion.training import BatchRNG

# Left out at random, and learned to do without. context: for guidance, as latent diffusion does; pose: infer.py may have none;
# hint: a garment that only the Q-Former read. The paper gives no numbers.
DROP = {"context": 0.2, "pose": 0.1, "hint": 0.1}

Batch = dict[str, Tensor]
# What the frozen networks encode.
PIXELS = {"picture", "pictures", "x0", "person", "agnostic", "pose", "hints"}


def _not_pixels(batch: Batch) -> Batch:
    """What goes on as it is: token ids, masks, ids of products, odds, the mask at latent resolution."""
    return {k: v for k, v in batch.items() if k not in PIXELS}


@torch.no_grad()
def encode_picture(model: UniFashion, batch: Batch) -> Batch:
    """For a Q-Former that learns: features (b,257,1408)."""
    return {"features": model.vit(batch["picture"]), **_not_pixels(batch)}


@torch.no_grad()
def encode_z(model: UniFashion, batch: Batch) -> Batch:
    """For training on a frozen Q-Former: Z_I (b,32,768)."""
    return {"z": model.qformer(model.see(batch["picture"]))[0], **_not_pixels(batch)}


@torch.no_grad()
def encode_generate(model: UniFashion, batch: Batch) -> Batch:
    """Z_I, and mean and logvar (b,4,64,48) of the picture's latent."""
    mean, logvar = model.vae.moments(batch["x0"])
    return {**encode_z(model, batch), "mean": mean, "logvar": logvar}


@torch.no_grad()
def encode_composed(model: UniFashion, batch: Batch) -> Batch:
    """features of reference and target (b,2,257,1408), texts; mean and logvar of the target, where it is to be drawn."""
    encoded = _not_pixels(batch)
    encoded["features"] = torch.stack([model.vit(p) for p in batch["pictures"].unbind(1)], dim=1)
    if "x0" in batch:
        # In pieces: at full size the VAE's activations of 128 pictures would be the largest thing in memory.
        pieces = [model.vae.moments(x) for x in batch["x0"].split(32)]
        encoded["mean"], encoded["logvar"] = (torch.cat(x) for x in zip(*pieces, strict=True))
    return encoded


@torch.no_grad()
def encode_tryon(model: UniFashion, batch: Batch) -> Batch:
    """features (b,2,257,1408) and hints (b,2,4,64,48) of cloth and sketch, and the scene."""
    mean, logvar = model.vae.moments(batch["person"])
    return {
        **_not_pixels(batch),
        "features": torch.stack([model.vit(p) for p in batch["pictures"].unbind(1)], dim=1),
        "hints": torch.stack([model.vae.encode(h) for h in batch["hints"].unbind(1)], dim=1),
        "mean": mean,
        "logvar": logvar,
        "agnostic": model.vae.encode(batch["agnostic"]),
        "pose": model.vae.encode(batch["pose"]),
    }


def z_i(model: UniFashion, batch: Batch) -> Tensor:
    """Z_I = Q-Former(I, q), Eq. 2, unless it is there already."""
    return batch["z"] if "z" in batch else model.qformer(model.qformer.ln_vision(batch["features"]))[0]


def cross(model: UniFashion, batch: Batch, rng: BatchRNG, hardness: float) -> Batch:
    """Eq. 5."""
    qformer, features = model.qformer, batch["features"]
    _clamp(qformer.temp)
    ids, mask = batch["ids"], batch["mask"]
    seen = qformer.ln_vision(features)
    z, _ = qformer(seen)  # Eq. 2: two passes, so that neither sees the other
    _, text = qformer(ids=ids, mask=mask)
    sim = losses.similarity(gather(qformer.embed_image(z)), gather(qformer.embed_text(text)))

    all_ids, all_mask, product = gather(ids), gather(mask), gather(batch["product"])
    same = (product[:, None] == product) | (all_ids[:, None] == all_ids).all(-1)
    negatives = losses.hard_negatives(sim * hardness, qformer.temp, same, rng.generator)
    no_text, no_image = map(local_rows, negatives)
    wrong = qformer.ln_vision(gather(features)[no_image])
    z, _ = qformer(  # one pass over (image, text), (image, wrong text), (wrong image, text)
        torch.cat([seen, seen, wrong]),
        torch.cat([ids, all_ids[no_text], ids]),
        torch.cat([mask, all_mask[no_text], mask]),
    )
    logits = qformer.itm_head(z).mean(1)
    return {"ITC": losses.itc(sim, qformer.temp), "ITM": losses.itm(logits[: len(ids)], logits[len(ids) :])}


def caption(model: UniFashion, batch: Batch, rng: BatchRNG, hardness: float) -> Batch:
    """Eq. 6."""
    return {"ITG": _itg(model, z_i(model, batch), batch)}


def generate(model: UniFashion, batch: Batch, rng: BatchRNG, hardness: float) -> Batch:
    """Eq. 7. Everything is to be repainted, and nothing is known but Z_I."""
    z = z_i(model, batch)
    context = model.drop_context(model.image_adapter(z), rng.keep(DROP["context"]))
    return {"q2I": _q2i(model, batch, context, rng)}


def composed(
    model: UniFashion, batch: Batch, rng: BatchRNG, hardness: float, without: tuple[str, ...] = ()
) -> Batch:
    """
    Eq. 13 less the parts that Table 5 leaves out: `without` some of "itg", "q2i", "caption".

    ITC(e_cls, Z_T) + ITC(e_cls, Z_C) + ITM(t, Z_T)   Eq. 10, where e_cls is the [CLS] of Z_R = Q-Former(I_R, t, q), Eq. 9
    ITG                                               Eq. 11: the target's caption from Z_R
    q2I                                               Eq. 12: the target's picture from Z_R
    """
    qformer = model.qformer
    _clamp(qformer.temp)
    reference, target = batch["features"].unbind(1)
    row = torch.arange(len(reference), device=reference.device)
    way = rng.categorical(torch.ones(batch["ways"].shape[:2]))  # in which the two captions are joined
    ids, mask = batch["ways"][row, way], batch["ways_mask"][row, way]
    seen, seen_target = qformer.ln_vision(reference), qformer.ln_vision(target)
    z_r, text = qformer(seen, ids, mask)  # Eq. 9
    z_t, _ = qformer(seen_target)
    e_cls = gather(qformer.embed_text(text))
    sim = losses.similarity(gather(qformer.embed_image(z_t)), e_cls)
    parts = {"ITC": losses.itc(sim, qformer.temp)}
    if "caption" not in without:
        _, words = qformer(ids=batch["caption_ids"], mask=batch["caption_mask"])
        parts["ITC caption"] = losses.itc(_dot(gather(qformer.embed_text(words)), e_cls), qformer.temp)

    # ITM: do the queries that read (reference, text) find in a picture what they ask for? The reference itself is the likeliest
    # wrong answer to its query, so it is a candidate beside the other targets.
    with torch.no_grad():
        z, _ = qformer(seen)
        sim_reference = losses.similarity(qformer.embed_image(z), local_rows(e_cls)).diagonal()
    target_id = gather(batch["target_id"])
    negatives = losses.hard_negatives(
        sim * hardness,
        qformer.temp,
        target_id[:, None] == target_id,
        rng.generator,
        gather(sim_reference) * hardness,
    )
    no_query, no_target = map(local_rows, negatives)
    targets = gather(target)
    is_reference = (no_target == len(targets))[:, None, None]
    wrong = torch.where(is_reference, reference, targets[no_target.clamp(max=len(targets) - 1)])
    z, _ = qformer(  # (query, its target), (query, wrong target), (wrong query, target)
        torch.cat([seen_target, qformer.ln_vision(wrong), seen_target]),
        torch.cat([ids, ids, gather(ids)[no_query]]),
        torch.cat([mask, mask, gather(mask)[no_query]]),
        queries=torch.cat([z_r, z_r, gather(z_r)[no_query]]),
    )
    logits = qformer.itm_head(z).mean(1)
    parts["ITM"] = losses.itm(logits[: len(ids)], logits[len(ids) :])

    if "itg" not in without:
        parts["ITG"] = _itg(model, z_r, batch)
    if "q2i" not in without:
        parts["q2I"] = _q2i(model, batch, model.image_adapter(z_r), rng)
    return parts


def tryon(model: UniFashion, batch: Batch, rng: BatchRNG, hardness: float) -> Batch:
    """Eq. 7 with what is known of the person. Each sample is conditioned on one of `samples.CONDITIONS`, at random."""
    row = torch.arange(len(batch["mean"]), device=batch["mean"].device)
    condition = rng.categorical(batch["odds"])  # cloth, cloth+text, sketch+text, sketch
    is_sketch, uses_text = (condition >= 2).long(), (condition == 1) | (condition == 2)
    hint, z = batch["hints"][row, is_sketch], z_of_condition(model, batch, is_sketch, uses_text)
    pose = batch["pose"] * rng.keep(DROP["pose"])[:, None, None, None]
    scene = model.scene(batch["agnostic"], batch["keep"], pose)
    context = model.drop_context(model.image_adapter(z), rng.keep(DROP["context"]))
    keep_hint = rng.keep(DROP["hint"]).to(hint.dtype)
    return {"q2I": _q2i(model, batch, context, rng, scene, hint, keep_hint)}


def z_of_condition(model: UniFashion, batch: Batch, is_sketch: Tensor, uses_text: Tensor) -> Tensor:
    """is_sketch (b,) 0 for the cloth photo, 1 for the sketch; uses_text (b,) bool -> Z (b,32,768)."""
    row = torch.arange(len(is_sketch), device=is_sketch.device)
    seen = model.qformer.ln_vision(batch["features"][row, is_sketch])
    # A text that is masked is no text: the queries attend to what the mask shows.
    z, _ = model.qformer(seen, batch["ids"], batch["mask"] & uses_text[:, None])
    return z


def _itg(model: UniFashion, z: Tensor, batch: Batch) -> Tensor:
    logits = model.predict_words(z, batch["before"][0], batch["after"])
    return losses.itg(logits, batch["after"], batch["answer"])


def _q2i(
    model: UniFashion,
    batch: Batch,
    context: Tensor,
    rng: BatchRNG,
    scene: Tensor | None = None,
    hint: Tensor | None = None,
    keep_hint: Tensor | None = None,
) -> Tensor:
    mean, logvar = batch["mean"], batch["logvar"]
    shape = mean.shape[1:]
    x0 = model.vae.sample(mean, logvar, rng.normal(*shape))
    t, noise = rng.timesteps(diffusion.TIMESTEPS), rng.normal(*shape)
    scene = model.blank_scene(len(mean)) if scene is None else scene
    x = diffusion.q_sample(x0, t, noise)
    return model.q2i(model.predict_noise(x, t, scene, context, hint, keep_hint), noise, t)


def _dot(captions: Tensor, e_cls: Tensor) -> Tensor:
    """Unit vectors (b1,c), (b2,c) -> (b1,b2), in float32."""
    return losses.similarity(captions[:, None], e_cls)


@torch.no_grad()
def _clamp(temp: Tensor) -> None:
    temp.clamp_(0.001, 0.5)  # as ALBEF and BLIP do; the official code forgot it
