"""Llama 2's decoder (arXiv 2302.13971, 2307.09288), the captioner's: RMSNorm, rotary positions, SwiGLU, a static KV cache.

    embeddings (b,t,4096), of tokens and soft prompts --32 x [attention, MLP], pre-norm--> norm --lm_head--> logits (b,t,32000)

    x = x + attn(attn_norm(x))        q, k, v, o without biases; q and k are rotated by their positions
    x = x + mlp(mlp_norm(x))          down(silu(gate(x)) * up(x))

Generation reads the prompt once; after that every step is one token for each row, in buffers that stay where they are.
Original layout: Hugging Face's, as Vicuna-7B v1.5 is published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = 128  # a cache has a multiple of so many slots, so that few shapes occur


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000
    dim: int = 4096
    depth: int = 32
    heads: int = 32
    mlp_dim: int = 11008
    context: int = 4096  # positions it was trained on
    eps: float = 1e-5  # Llama 1, and so Vicuna before v1.5: 1e-6
    theta: float = 10000.0  # the slowest rotation turns once in 2 pi theta positions

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads of an even width")


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half precision
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """
    Keys and values of all layers, b rows of n slots, made once: a step writes its slot, and nothing is moved or joined.

    A slot is a place in memory, not a position in the text: padding takes slots, too, and is masked.
    """

    def __init__(self, cfg: LlamaConfig, b: int, n: int, like: Tensor) -> None:
        shape = (b, cfg.heads, n, cfg.dim // cfg.heads)
        # One tensor a layer: of what is a part of another torch.compile would copy the whole at every step.
        self.k, self.v = ([like.new_zeros(shape) for _ in range(cfg.depth)] for _ in range(2))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (b,h,t,d) into `slots` (t,) -> all of that layer's (b,h,n,d)."""
        self.k[layer].index_copy_(2, slots, k.to(self.k[layer].dtype))
        self.v[layer].index_copy_(2, slots, v.to(self.v[layer].dtype))
        return self.k[layer], self.v[layer]

    def repeat(self, times: int) -> None:
        """Each row becomes so many."""
        self.k, self.v = ([x.repeat_interleave(times, 0) for x in layers] for layers in (self.k, self.v))

    def pick(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: beams that go on from another beam take over its past."""
        for layer in (*self.k, *self.v):
            layer.copy_(layer[rows])


class Attention(nn.Module):
    def __init__(self, cfg: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = cfg.heads, layer
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: KVCache | None,
        slots: Tensor | None,
    ) -> Tensor:
        """
        x (b,t,dim); rotation from `rotations`; bias (b,1,t,n), 0 or -inf, added to the scores: without it, what is causal.
        With a cache, keys and values go into its `slots` (t,), and its first n are attended to.
        """
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = (past[:, :, : bias.shape[-1]] for past in cache.write(self.layer, slots, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.o(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(cfg.dim, cfg.mlp_dim, bias=False)
        self.up = nn.Linear(cfg.dim, cfg.mlp_dim, bias=False)
        self.down = nn.Linear(cfg.mlp_dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, cfg: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotation, bias, cache, slots)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # in training, layers are computed again in the backward pass: less memory
        self.record: Callable[[Callable], Callable] | None = None  # `fast.py`: makes CUDA graphs of `step`
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.depth))
        self.norm = RMSNorm(cfg.dim, cfg.eps)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)  # not tied to `embed`
        self.apply(_init)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """
        x      (b,t,dim) embeddings, of tokens (`embed`), of soft prompts, or of both
        mask   (b,t) bool, False on padding, which may be anywhere. Without a mask there is none. A batch padded on the right
               needs none either: what is causal does not see what comes later.
        cache  is written at `slots` (t,) int64; then mask is (b,n), of its first n slots, which are those attended to
        ->     (b,t,dim), normalised: what `logits` reads. On padding it means nothing.
        """
        t = x.shape[1]
        if mask is None and cache is not None:  # its slots are not the columns of x
            mask = torch.ones(len(x), cache.k[0].shape[2], dtype=torch.bool, device=x.device)
        bias = None
        positions = torch.arange(t, device=x.device)[None]
        if mask is not None:
            at = positions[0] if slots is None else slots
            keys = torch.arange(mask.shape[1], device=x.device)
            # Padding may see itself, and nothing else: a row of softmax that may see nothing would be nan.
            allowed = (keys <= at[:, None]) & mask[:, None, None] | (keys == at[:, None])
            # As numbers to add, made once for all layers: scaled_dot_product_attention would make them in each.
            bias = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, -torch.inf)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, at]
        rotation = rotations(positions, self.cfg, x.dtype)
        for layer in self.layers:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, bias, use_reentrant=False)
            else:
                x = layer(x, rotation, bias, cache, slots)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (...,dim) from `forward` -> (...,vocab_size), in float32 at least, as the softmax wants them."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def step(self, cache: KVCache, tokens: Tensor, mask: Tensor, slot: Tensor) -> Tensor:
        """
        All that one step of generation computes: each row's next token, tokens (b,), into `slot` (1,) of the cache; mask (b,n) as
        in `forward` -> logits (b,vocab_size) of the one after it.
        """
        return self.logits(self(self.embed(tokens[:, None]), mask, cache, slot)[:, 0])


def rotations(positions: Tensor, cfg: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """
    positions (b,t) -> cos and sin (b,1,t,d) of the angles by which the dims of a head turn, in float32 at least.

    In Hugging Face's order: dim i turns with dim i + d/2 (Meta's own files: 2i with 2i + 1). The angles are computed in
    float64, which the originals do in float32: 1e-6 off after some hundred positions.
    """
    d = cfg.dim // cfg.heads
    speed = cfg.theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float64) / d)
    angle = rearrange(positions, "b t -> b 1 t 1") * speed
    angle = torch.cat([angle, angle], dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b,h,t,d), turned by `rotations`."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


# ------------------------------------------------------------------------------------------------ generation


@torch.no_grad()
def generate(llama: Llama, prompt: Tensor, mask: Tensor, max_tokens: int, eos: int, beams: int = 1) -> Tensor:
    """
    The most likely continuation of each row: greedily, or with `beams` of them followed at a time.

    prompt  (b,t,dim) embeddings
    mask    (b,t) bool, False on padding, on either side
    ->      (b,max_tokens) int64, filled up with `eos` after a row's end

    A row gets what it would get alone. Raises ValueError for less than one token or beam, and beyond the context.
    """
    room = llama.cfg.context - prompt.shape[1]
    if not 1 <= max_tokens <= room:
        raise ValueError(f"max_tokens is {max_tokens}, must be 1 to {room}")
    if not 1 <= beams <= llama.cfg.vocab_size // 2:
        raise ValueError(f"beams is {beams}, must be 1 to {llama.cfg.vocab_size // 2}")
    search = greedy if beams == 1 else partial(beam_search, beams=beams)
    return search(llama, prompt, mask, max_tokens, eos)


class Steps:
    """The prompt, read once and then continued by one token a row and step."""

    def __init__(self, llama: Llama, prompt: Tensor, mask: Tensor, max_tokens: int, beams: int = 1) -> None:
        b, t, _ = prompt.shape
        n = -(-(t + max_tokens) // PIECE) * PIECE
        self.slot = t
        self.slots = torch.arange(n, device=prompt.device)
        self.mask = F.pad(mask, (0, n - t), value=True)
        like = llama.norm.weight  # what training in shards leaves whole
        self.cache = KVCache(llama.cfg, b, n, like)
        hidden = llama(prompt, mask, self.cache, self.slots[:t])
        last = (mask * self.slots[:t]).argmax(1)  # of the prompt's tokens, where padding is on the right
        # (b,vocab) of the next token
        self.logits = llama.logits(hidden[torch.arange(b, device=mask.device), last])
        if beams > 1:
            self.mask = self.mask.repeat_interleave(beams, 0)
            self.cache.repeat(beams)
        step = partial(llama.step, self.cache)
        self.step = llama.record(step) if llama.record else step

    def take(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """tokens (b,), the next of each row; rows (b,) which rows they continue, if not their own. -> new `logits`."""
        if rows is not None:
            self.cache.pick(rows)
        slot = self.slots[self.slot : self.slot + 1]
        self.slot += 1
        self.logits = self.step(tokens, self.mask, slot)


@torch.no_grad()
def greedy(llama: Llama, prompt: Tensor, mask: Tensor, max_tokens: int, eos: int) -> Tensor:
    """As `generate`."""
    steps = Steps(llama, prompt, mask, max_tokens)
    out = torch.full((len(prompt), max_tokens), eos, device=prompt.device)
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for i in range(max_tokens):
        tokens = steps.logits.argmax(-1).masked_fill(done, eos)
        out[:, i] = tokens
        done = tokens == eos
        if i + 1 < max_tokens:
            steps.take(tokens)
            # Asked only now that the next step is under way, so that a GPU has work while the answer travels.
            if done.all():
                break
    return out


@torch.no_grad()
def beam_search(llama: Llama, prompt: Tensor, mask: Tensor, max_tokens: int, eos: int, beams: int) -> Tensor:
    """
    As `generate`. A row's `beams` most likely beginnings go on; ends are scored by log-probability per token, EOS counted.

    A row is decided when its best beginning, scored as if it ended here, is no better than the worst of `beams` ends.
    """
    b, vocab, nothing = len(prompt), llama.cfg.vocab_size, -1e9
    steps = Steps(llama, prompt, mask, max_tokens, beams)
    first_row = torch.arange(b, device=prompt.device)[:, None] * beams
    logits = steps.logits[:, None].expand(-1, beams, -1)
    # All beams begin alike: but for the first they start hopeless, so that the first step spreads them.
    score = logits.new_full((b, beams), nothing)
    score[:, 0] = 0.0
    text = torch.full((b, beams, max_tokens), eos, device=prompt.device)
    ends, end_score = text.clone(), torch.full_like(score, nothing)
    open_ = torch.ones(b, 1, dtype=torch.bool, device=prompt.device)
    for i in range(max_tokens):
        total = score[..., None] + logits.log_softmax(-1)
        # Twice as many as beams: half of them at most can be ends, so that enough are left to go on.
        best, index = total.flatten(1).topk(2 * beams)
        beam, token = index // vocab, index % vocab
        grown = text.gather(1, beam[..., None].expand(-1, -1, max_tokens))
        grown[:, :, i] = token

        last = i + 1 == max_tokens
        ended = torch.ones_like(token, dtype=torch.bool) if last else token == eos
        # An end that the others outdo is none.
        among_first = torch.arange(2 * beams, device=token.device) < beams
        offer = (best / (i + 1)).masked_fill(~(ended & among_first & open_), nothing)
        end_score, kept = torch.cat([end_score, offer], 1).topk(beams)
        ends = torch.cat([ends, grown], 1).gather(1, kept[..., None].expand(-1, -1, max_tokens))
        if last:
            break

        score, kept = best.masked_fill(ended, nothing).topk(beams)
        text = grown.gather(1, kept[..., None].expand(-1, -1, max_tokens))
        rows = first_row + beam.gather(1, kept)
        open_ = open_ & (score[:, :1] / (i + 1) > end_score[:, -1:])
        steps.take(text[:, :, i].flatten(), rows.flatten())
        logits = rearrange(steps.logits, "(b k) v -> b k v", k=beams)
        if not open_.any():  # asked when the next step is under way, as in `greedy`
            break
    return ends[:, 0]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
