"""The losses but the diffusion loss q2I, which is `UniFashion.q2i`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """image (b1,q,c), text (b2,c), unit vectors -> (b1,b2): the best of the queries. In float32 at least: bf16 ties cost recall."""
    with torch.autocast(image.device.type, enabled=False):
        scores = torch.einsum("iqc,jc->ijq", _wide(image), _wide(text))
    return scores.amax(-1)


def itc(sim: Tensor, temp: Tensor) -> Tensor:
    """Eq. 3, both directions: sim (b,b) with the pairs on the diagonal. Summed as the official code does, not halved."""
    target = torch.arange(len(sim), device=sim.device)
    logits = sim / temp
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def hard_negatives(
    sim: Tensor, temp: Tensor, same: Tensor, generator: torch.Generator, sim_extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    For each image a text, and for each text an image, that look alike and do not belong together (BLIP-2, Sec. 3.1).

    sim        (b,b) rows images, columns texts
    same       (b,b) bool, True where image and text do belong together: never drawn. A row that is all True draws
               from the other items evenly.
    generator  on the CPU: the draw is the same whatever the device
    sim_extra  (b,) similarity of each text to one extra candidate image (in composed retrieval, the query's reference)
    ->         text index for each image (b,), image index for each text (b,); there, index b means the extra image
    """
    logits = (sim.detach() / temp.detach()).float().cpu()
    same = same.cpu()

    def draw(logits: Tensor, same: Tensor) -> Tensor:
        # nan_to_num: after a divergence the NaN loss is reported (runs.NaNWatch), not a crash of multinomial.
        likely = logits.masked_fill(same, -1e4).softmax(-1).nan_to_num()
        weights = likely.masked_fill(same, 0.0) + 1e-6 * (~same)  # 1e-6: allowed, though softmax underflows
        no_negative = same.all(-1, keepdim=True)
        others = 1.0 - torch.eye(*same.shape)
        return torch.multinomial(torch.where(no_negative, others, weights), 1, generator=generator)[:, 0]

    texts = draw(logits, same)
    logits, same = logits.T, same.T
    if sim_extra is not None:
        extra = (sim_extra.detach() / temp.detach()).float().cpu()[:, None]
        logits = torch.cat([logits, extra], 1)
        same = torch.cat([same, torch.zeros_like(extra, dtype=torch.bool)], 1)
    return texts.to(sim.device), draw(logits, same).to(sim.device)


def itm(positive: Tensor, negatives: Tensor) -> Tensor:
    """Eq. 4 as BLIP-2 does it: binary cross-entropy. positive (b,2) and negatives (2b,2) logits of (no match, match)."""
    logits = _wide(torch.cat([positive, negatives]))
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    target[: len(positive)] = 1
    return F.cross_entropy(logits, target)


def itg(logits: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """
    Eq. 6: minus the mean log-probability of a caption's tokens, then the mean over captions.

    logits (b,t,vocab), what column i says of ids[:, i]; ids (b,t); answer (b,t) bool, True on the caption's own tokens
    """
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return ((loss * answer).sum(1) / answer.sum(1)).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
