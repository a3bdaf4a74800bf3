"""A small GPT, its optimizer and its five minutes: the one file that experiments change.

prepare.py fixes the data, the clock and the evaluation. `build_model(profile)` must return an untrained module whose
`forward(idx)` maps (B, T) token ids to (B, T, vocab) logits; the rest is free.

Not covered: more than one GPU, inference with a cache, resuming a run.
"""

# isort: split
import gc
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare

# ---------------------------------------------------------------------------
# Hyperparameters. bpb figures: steps of the published night on an H100 unless said otherwise.


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a run. The defaults are the published final configuration for an H100."""

    n_layer: int = 9  # 8 layers +0.003, 10 layers +0.002
    n_embd: int = 640  # width, a multiple of head_dim
    head_dim: int = 128
    short_window: int = 256  # tokens that four of five layers see, the last one sees all: -0.0012; 0: every layer does
    document_mask: bool = False  # attention stays within the document; for the dense attention of short rows on a CPU
    table_dtype: torch.dtype = torch.bfloat16  # of the embedding tables and their moments: half the memory traffic
    value_embeds: bool = True  # a second embedding of the token, mixed into the values of every other layer
    smear: bool = False  # mixes the token before into each embedding, by a learned share for each channel
    conv_taps: int = 0  # earlier tokens that a short convolution mixes into queries, keys, values and MLP input
    ngrams: tuple[int, ...] = ()  # lengths of the n-grams with a table: the most frequent, added to the embedding
    ngram_rows: int = 0  # of each table
    ngram_dropout: float = 0.0  # share of the positions that do without their n-grams, from the second epoch on
    softcap: float = 15.0  # logits are squashed into (-softcap, softcap); 0: not
    step_tokens: int = 2**18  # tokens of one optimizer step; 2^19: +0.0119
    micro_rows: int = 0  # rows of one forward pass; 0: as many as fit the card
    embed_lr: float = 0.9  # AdamW, whose rates are scaled by (width / 768)^-0.5; .6 -> .8: -0.0033
    ngram_lr: float = 0.0
    embed_decay: float = 0.001
    head_decay: float = 0.01
    value_decay: float = 0.003
    ngram_decay: float = 0.0
    matrix_decay: float = 0.2  # cautious, falls to 0 over the run
    warmdown: float = 0.75  # fraction of the run over which the rates fall
    final_lr: float = 0.05  # fraction of the rates that is left at the end
    momentum_steps: int = 200  # Muon's momentum rises from 0.85 to 0.95 over them


CONFIGS = {  # by profile.sizes: the class of the card, or the cpu profile
    "H100": Config(),
    "A100": Config(n_layer=8, n_embd=512, step_tokens=2**17),  # between its neighbours, not measured
    "RTX 4090": Config(n_layer=5, n_embd=512, step_tokens=2**16),  # where owners of one ended up
    "small": Config(n_layer=4, n_embd=384, step_tokens=2**15),  # from 8 GB up
    "cpu": Config(
        n_layer=2,  # against 3 at the same cost: 1.292 against 1.301 after 4.1M and 2.9M tokens
        n_embd=128,  # 1.287 after 487 steps, 192 channels 1.331 after 302, which take as long
        head_dim=64,  # two heads: fewer and wider ones are faster here
        short_window=0,  # rows of 256 are short already
        document_mask=True,  # a row holds some two documents, and they have nothing to do with each other: -0.003
        table_dtype=torch.float32,  # small tables, and the last small steps are not rounded away
        smear=True,  # -0.003 after 430 steps, for some 4 % of a step
        conv_taps=2,  # -0.010 after 300 s, for some 8 % of a step
        ngrams=(2,),  # -0.03 at equal steps (hashed: -0.026); triples -0.009 more after 60 s, unsure after 300 s
        ngram_rows=2**16,  # pairs that occur four times and more, 83 % of the text; half of the rows: +0.007
        ngram_dropout=0.5,  # 300 s, 4.6 epochs: 1.236 against 1.245; from the first epoch on it costs 0.02 after 60 s
        softcap=0.0,  # tanh over all logits was 13 % of a step; without it -0.002 at equal steps
        step_tokens=2**12,  # half of it: the same at equal tokens, but slower; twice: +0.007
        micro_rows=16,  # fixed: it moves no val_bpb
        embed_lr=0.6,
        ngram_lr=0.03,  # a row that is hit once moves by five times as much
        embed_decay=0.003,  # with value_decay: .001 -> .003 -0.004 over four epochs, +0.0004 after 60 s
        head_decay=0.1,  # .01 -> .1: -0.004 over four epochs, +0.002 after 60 s; .3 loses it again
        value_decay=0.01,  # .003 -> .01: -0.0014
        ngram_decay=0.1,  # forgets pairs that are not seen again: without it the second epoch overfits, 1.307 against 1.254
        matrix_decay=0.1,
        warmdown=1.0,
        final_lr=0.0,
        momentum_steps=100,
    ),
}
HEAD_LR = 0.005  # AdamW; cpu profile: half of it +0.01, twice -0.001
SCALAR_LR = 0.5
MATRIX_LR = 0.04  # Muon
ROPE_BASE = 200_000  # 10k -> 200k: -0.0012
X0_INIT = 0.05  # share of the embedding added again before each layer; 0: +0.004
GATE_CHANNELS = 32  # channels of the residual stream that decide how much value embedding a head takes
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
MUON_BETA2 = 0.95  # NorMuon's second moment
BLOW_UP = 100.0  # fixed, nats: a loss over this, or NaN, ends the run


def config_of(profile) -> Config:
    """The sizes for a profile. Raises ValueError if they do not fit together."""
    config = CONFIGS[profile.sizes]
    if config.n_embd % config.head_dim:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of head_dim {config.head_dim}")
    if config.step_tokens % profile.max_seq_len:
        raise ValueError(f"step_tokens {config.step_tokens} is not a multiple of a row's {profile.max_seq_len} tokens")
    return config


# ---------------------------------------------------------------------------
# Model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias; weights are float32 and follow the activations' dtype, so that no autocast is needed."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021) of (B, T, H, D), by halves of D."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def windowed_attention(q, k, v, window: int):
    """Causal attention of (B, H, T, D) over the last `window` tokens, the query's own included. T is over `window`.

    For cards without a kernel that takes a window. Each block of `window` queries sees its own block and the one before. The
    blocks lie in the batch, since torch's fused kernels refuse 5-D tensors and the plain one would write every score to memory.
    """
    B, H, T, D = q.shape
    n = -(-T // window)
    blocks = (F.pad(t, (0, 0, 0, n * window - T)).view(B, H, n, window, D).transpose(1, 2) for t in (q, k, v))
    q, k, v = blocks  # (B, n, H, W, D)
    first = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=True)  # (B, H, W, D)
    k, v = (torch.cat([t[:, :-1], t[:, 1:]], dim=3).flatten(0, 1) for t in (k, v))  # (B(n-1), H, 2W, D)
    i = torch.arange(window, device=q.device)[:, None] + window  # position of the query within its two blocks
    j = torch.arange(2 * window, device=q.device)[None]
    mask = (j <= i) & (j > i - window)  # (W, 2W)
    rest = F.scaled_dot_product_attention(q[:, 1:].flatten(0, 1), k, v, attn_mask=mask)  # (B(n-1), H, W, D)
    y = torch.cat([first[:, None], rest.view(B, n - 1, H, window, D)], dim=1)  # (B, n, H, W, D)
    return y.transpose(1, 2).reshape(B, H, n * window, D)[:, :, :T]


def dense_attention(q, k, v, documents=None):
    """Causal attention of (B, H, T, D) by plain matrix products: for short rows on a CPU faster than the fused kernel.

    Given the (B, T) number of each token's document it stays within them.
    """
    T, D = q.shape[-2:]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])  # (B, 1, T, T)
    scores = (q @ k.mT).float() * D**-0.5  # (B, H, T, T)
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v.dtype) @ v


def attend(q, k, v, window: int, backend: str, documents=None):
    """Causal attention of (B, T, H, D) within each row; window 0 is the whole row."""
    B, T, H, D = q.shape
    if backend != "sdpa":
        from torch.nn.attention.varlen import varlen_attn

        assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
        ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        left = window - 1 if window else -1  # the kernel counts the keys to the left of the query
        y = varlen_attn(*(t.flatten(0, 1) for t in (q, k, v)), ends, ends, T, T, window_size=(left, 0))
        return y.view(B, T, H, D)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if window and window < T:
        y = windowed_attention(q, k, v, window)
    elif q.device.type == "cpu" and T <= 512:
        y = dense_attention(q, k, v, documents)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2)


@cache
def choose_attention(device: torch.device, dtype: torch.dtype, chosen: str | None) -> str:
    """The first backend that proves itself: FlashAttention 3, 4 or 2, else torch's own.

    `chosen` is what the night's baseline took: every later run takes the same. Raises what its package raises if it is gone.
    """
    if device.type == "meta" and dtype != torch.float32:
        return "FA2"  # there its shapes and dtypes are checked
    if device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa"
    if chosen:
        prepare.activate_attention(chosen)
        return chosen
    for backend in ("FA3", "FA4", "FA2", "sdpa"):
        trouble = attention_trouble(backend, device, dtype)
        if not trouble:
            break
        print(f"attention: {backend} does not work here: {trouble}", flush=True)
    else:
        raise SystemExit("no attention backend works on this card; the lines above say why")
    print(f"attention: {backend}", flush=True)
    return backend


def attention_trouble(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a backend, as one line; empty if it agrees with a dense mask."""
    try:
        prepare.activate_attention(backend)
        errors = [attention_error(partial(attend, backend=backend), w, device, dtype) for w in (256, 0)]
    except Exception as error:  # whatever it is, the next backend may work
        return (str(error) or type(error).__name__).split("\n")[0][:120]
    return "" if max(errors) < 0.01 else f"it differs from a dense mask by {max(errors):.1%}"


def attention_error(attention, window: int, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of y, dq, dk and dv of attention(q, k, v, window) on (B, T, H, D), against a float32 dense mask.

    The inputs are chirps: with plain sine waves dq and dk cancel, and rounding alone is 7 % of them. A correct bf16 kernel errs by
    0.004, a window that is off by one by 0.024 (measured on a CPU).
    """
    B, T, H, D = 2, 512, 2, 128
    wave = torch.arange(B * T * H * D, device=device, dtype=torch.float64).view(B, T, H, D)
    q, k, v, g = (torch.sin(wave.square() * pitch).to(dtype) for pitch in (0.7, 1.3, 2.9, 0.3))
    i = torch.arange(T, device=device)
    mask = (i <= i[:, None]) & (i > i[:, None] - (window or T))

    def dense(q, k, v, window):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)

    results = []
    for function, kind in ((dense, torch.float32), (attention, dtype)):
        inputs = [t.to(kind, copy=True).requires_grad_() for t in (q, k, v)]
        y = function(*inputs, window)
        results.append([y, *torch.autograd.grad(y, inputs, g.to(kind))])
    errors = [((a - b.float()).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def short_convolution(x, taps):
    """Each channel of (B, T, C) plus its last K values, weighted by taps (K, C): Primer's depthwise one, So et al. 2021."""
    mixed = x
    for i, tap in enumerate(taps.to(x.dtype), 1):
        mixed = mixed + tap * F.pad(x, (0, 0, i, 0))[:, :-i]
    return mixed


class NgramTable(nn.Module):
    """An embedding for each of the most frequent n-grams of a text, found by exact match; one for all others.

    After the over-tokenized transformer (Huang et al. 2025), which hashes.
    """

    def __init__(self, n: int, rows: int, n_embd: int, vocab_size: int, dtype: torch.dtype):
        super().__init__()
        self.n, self.vocab_size = n, vocab_size
        self.table = nn.Embedding(rows, n_embd, dtype=dtype)
        self.register_buffer("known", torch.arange(rows - 1) + vocab_size**n)  # sorted; until learn() no text has any

    def number(self, idx):
        """(B, T) token ids -> (B, T): each with the n - 1 before it as one number, zeros before the first."""
        T, idx = idx.size(1), F.pad(idx, (self.n - 1, 0))
        return sum(idx[:, i : i + T] * self.vocab_size ** (self.n - 1 - i) for i in range(self.n))

    def learn(self, rows):
        """Takes the most frequent n-grams of (N, T+1) rows of text: which they are, nothing of what follows them."""
        numbers, counts = self.number(torch.from_numpy(rows[:, :-1].astype("int64"))).unique(return_counts=True)
        frequent = numbers[counts.topk(min(len(self.known), len(numbers))).indices].sort().values
        self.known[: len(frequent)] = frequent

    def forward(self, idx):
        numbers = self.number(idx)
        at = torch.searchsorted(self.known, numbers).clamp_max(len(self.known) - 1)
        return self.table(torch.where(self.known[at] == numbers, at + 1, 0))  # (B, T, C)


class Attention(nn.Module):
    def __init__(self, config: Config, window: int, value_embed: bool, backend: str):
        super().__init__()
        self.head_dim, self.window, self.backend = config.head_dim, window, backend
        self.query, self.key, self.value, self.out = (Linear(config.n_embd, config.n_embd) for _ in range(4))
        self.gate = Linear(GATE_CHANNELS, config.n_embd // config.head_dim) if value_embed else None
        taps = torch.zeros(3, config.conv_taps, config.n_embd)  # no mixing at the start
        self.taps = nn.Parameter(taps) if config.conv_taps else None

    def forward(self, x, value_embed, cos, sin, documents):
        B, T, C = x.shape
        q, k, v = (layer(x) for layer in (self.query, self.key, self.value))
        if self.taps is not None:
            q, k, v = (short_convolution(t, taps) for t, taps in zip((q, k, v), self.taps, strict=True))
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        if self.gate is not None:  # value embeddings, gated per head by the input (as in nanochat)
            gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))  # (B, T, H), 1 at the start
            v = v + gate[..., None] * value_embed.view(B, T, -1, self.head_dim)
        q, k = (norm(rotate(t, cos, sin)) for t in (q, k))  # QK norm: Henry et al. 2020
        return self.out(attend(q, k, v, self.window, self.backend, documents).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up, self.down = Linear(config.n_embd, 4 * config.n_embd), Linear(4 * config.n_embd, config.n_embd)
        self.taps = nn.Parameter(torch.zeros(1, config.conv_taps, config.n_embd)) if config.conv_taps else None

    def forward(self, x):
        if self.taps is not None:
            x = short_convolution(x, self.taps[0])
        return self.down(F.relu(self.up(x)).square())  # ReLU^2: So et al. 2021


class Block(nn.Module):
    def __init__(self, config: Config, window: int, value_embed: bool, backend: str):
        super().__init__()
        self.attention, self.mlp = Attention(config, window, value_embed, backend), MLP(config)

    def forward(self, x, value_embed, cos, sin, documents):
        x = x + self.attention(norm(x), value_embed, cos, sin, documents)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: Config, vocab_size: int, max_seq_len: int, dtype: torch.dtype, backend: str = "sdpa"):
        super().__init__()
        n = config.n_layer
        has_value = [config.value_embeds and (n - 1 - i) % 2 == 0 for i in range(n)]
        windows = [config.short_window if i % 5 != 4 and i != n - 1 else 0 for i in range(n)]
        self.dtype, self.softcap, self.backend = dtype, config.softcap, backend  # dtype of the activations
        self.document_mask, self.bos_id = config.document_mask, vocab_size - len(prepare.SPECIAL_TOKENS)
        table_dtype = torch.promote_types(
            config.table_dtype, dtype
        )  # a card without bf16 compiles no graph that has one
        table = partial(nn.Embedding, embedding_dim=config.n_embd, dtype=table_dtype)
        self.embed = table(vocab_size)
        self.value_embeds = nn.ModuleDict({str(i): table(vocab_size) for i in range(n) if has_value[i]})
        self.blocks = nn.ModuleList(Block(config, windows[i], has_value[i], backend) for i in range(n))
        self.head = Linear(config.n_embd, vocab_size)
        kind = (config.ngram_rows, config.n_embd, vocab_size, table_dtype)
        self.ngrams = nn.ModuleList(NgramTable(length, *kind) for length in config.ngrams)
        self.register_buffer("ngram_dropout", torch.zeros(()), persistent=False)  # a float would recompile
        self.smear = nn.Parameter(torch.full((config.n_embd,), 0.5)) if config.smear else None
        self.residual_scale = nn.Parameter(torch.ones(n))  # x <- a x + b x0 before each layer
        self.x0_scale = nn.Parameter(torch.full((n,), X0_INIT))
        half = config.head_dim // 2
        angles = torch.outer(torch.arange(max_seq_len), ROPE_BASE ** -(torch.arange(half) / half))  # (T, D/2)
        self.register_buffer("cos", angles.cos().to(dtype)[:, None], persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angles.sin().to(dtype)[:, None], persistent=False)
        self.init_weights(config.n_embd)

    @torch.no_grad()
    def init_weights(self, n_embd: int):
        bound = 0.68 * math.sqrt(3 / n_embd)  # uniform of std 0.68 / sqrt(width): -0.0005
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.001)
        for ngrams in self.ngrams:
            nn.init.zeros_(ngrams.table.weight)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        for block in self.blocks:
            attention = block.attention
            for layer in (attention.query, attention.key, attention.value, block.mlp.up):
                nn.init.uniform_(layer.weight, -bound, bound)
            for layer in (attention.out, block.mlp.down, *([attention.gate] if attention.gate else [])):
                nn.init.zeros_(layer.weight)  # every block begins as the identity

    def forward(self, idx):
        """(B, T) -> (B, T, vocab), float32, squashed by the softcap (Gemma 2)."""
        T = idx.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        documents = (idx == self.bos_id).cumsum(1) if self.document_mask else None  # (B, T)
        x = norm(self.embed(idx).to(self.dtype))  # (B, T, C)
        if self.smear is not None:  # as modded-nanogpt's smear, without its gate
            x = norm(x + self.smear.to(x.dtype) * F.pad(x, (0, 0, 1, 0))[:, :-1])
        if self.ngrams:
            seen = sum(table(idx) for table in self.ngrams)
            if self.training:
                seen = seen * (torch.rand_like(seen[..., :1]) >= self.ngram_dropout) / (1 - self.ngram_dropout)
            x = x + seen.to(x.dtype)
        x0 = x
        for i, block in enumerate(self.blocks):
            x = self.residual_scale[i].to(x.dtype) * x + self.x0_scale[i].to(x.dtype) * x0
            value_embed = self.value_embeds[str(i)](idx).to(self.dtype) if str(i) in self.value_embeds else None
            x = block(x, value_embed, cos, sin, documents)
        logits = self.head(norm(x)).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def loss(self, idx, targets):
        """Mean cross-entropy in nats; what training compiles."""
        logits = self.forward(idx)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    def flops_per_token(self, max_seq_len: int) -> float:
        """Training FLOPs of a token (6 a matrix parameter, 12 a channel and attended token; Chowdhery et al. 2022)."""
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        matrices += self.head.weight.numel()
        attended = sum(min(block.attention.window or max_seq_len, max_seq_len) for block in self.blocks)
        return 6 * matrices + 12 * self.head.in_features * attended


def build_model(profile) -> GPT:
    """The untrained model of a profile."""
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[profile.dtype]
    backend = choose_attention(torch.get_default_device(), dtype, profile.attention)
    return GPT(config_of(profile), profile.vocab_size, profile.max_seq_len, dtype, backend)


# ---------------------------------------------------------------------------
# Optimizers: Muon for the blocks' matrices, AdamW for the rest

POLAR_EXPRESS = (  # Amsel et al. 2025: the best quintics, one after the other, for singular values from 1e-3 up
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(x):
    """The nearest matrices with all singular values near 1, of (K, n, m) stacked ones, in their dtype."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with NorMuon's variance by neuron (Li et al. 2025).

    One parameter group for each matrix shape; its matrices are stacked and stepped together. Weight decay is cautious:
    only for weights on which it agrees with the step (Chen et al. 2025). All state is made at once, so that a warm-up can reset it.
    """

    def __init__(self, matrices, lr: float, weight_decay: float, dtype: torch.dtype, compiled: bool = False):
        shapes = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        self.update = partial(update, dtype=dtype)
        for group in self.param_groups:
            first, K = group["params"][0], len(group["params"])
            n, m = first.shape
            self.state[first]["momentum"] = first.new_zeros(K, n, m)
            self.state[first]["variance"] = first.new_zeros((K, n, 1) if n >= m else (K, 1, m))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, state = group["params"], self.state[group["params"][0]]
            rates = torch.tensor([group["lr"], group["momentum"], group["weight_decay"]])  # floats would recompile
            stacked = torch.stack(params), torch.stack([p.grad for p in params])
            weights = self.update(*stacked, state["momentum"], state["variance"], rates.unbind())
            torch._foreach_copy_(params, list(weights.unbind()))


def muon_update(weights, grads, momentum, variance, rates, dtype: torch.dtype):
    """The new weights of (K, n, m) stacked matrices; momentum (K, n, m) and variance change in place.

    rates: learning rate, momentum and weight decay as 0-d tensors.
    """
    lr, beta, decay = rates
    n, m = weights.shape[-2:]
    momentum.lerp_(grads, 1 - beta)
    update = orthogonalise(grads.lerp(momentum, beta).to(dtype)).float()  # Nesterov
    variance.lerp_(update.square().mean(dim=-1 if n >= m else -2, keepdim=True), 1 - MUON_BETA2)
    scaled = update * variance.clamp_min(1e-10).rsqrt()
    norms = [x.square().sum(dim=(-2, -1), keepdim=True).sqrt() for x in (update, scaled)]
    update = scaled * (norms[0] / (norms[1] + 1e-10))  # as long as before
    agrees = (update * weights) >= 0
    return weights - lr * max(1.0, n / m) ** 0.5 * (update + decay * weights * agrees)


def build_optimizers(model: GPT, config: Config, dtype: torch.dtype, compiled=False) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon]; every group keeps its full rate in `initial_lr`."""
    scale = (config.n_embd / 768) ** -0.5
    gates = [block.attention.gate.weight for block in model.blocks if block.attention.gate is not None]
    is_gate = {id(p) for p in gates}
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2 and id(p) not in is_gate]
    slow = [part.taps for block in model.blocks for part in (block.attention, block.mlp) if part.taps is not None]
    slow += [p for p in (model.residual_scale, model.smear) if p is not None]
    value_tables = [table.weight for table in model.value_embeds.values()]
    groups = [
        dict(params=[model.embed.weight], lr=config.embed_lr * scale, weight_decay=config.embed_decay),
        dict(params=[model.head.weight], lr=HEAD_LR * scale, weight_decay=config.head_decay),
        dict(params=slow, lr=SCALAR_LR * 0.01, weight_decay=0.0),  # lower, since what they do compounds
        dict(params=[model.x0_scale], lr=SCALAR_LR, weight_decay=0.0, betas=(0.96, 0.95)),
    ]
    if value_tables:
        groups.append(dict(params=value_tables, lr=config.embed_lr * scale, weight_decay=config.value_decay))
    ngram_tables = [ngrams.table.weight for ngrams in model.ngrams]
    if ngram_tables:
        groups.append(dict(params=ngram_tables, lr=config.ngram_lr * scale, weight_decay=config.ngram_decay))
    if gates:
        groups.append(dict(params=gates, lr=HEAD_LR * scale, weight_decay=0.0))
    fused = model.head.weight.device.type != "meta"  # computes in float32 and rounds bf16 tables once
    adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPS, fused=fused)
    muon = Muon(matrices, lr=MATRIX_LR, weight_decay=config.matrix_decay, dtype=dtype, compiled=compiled)
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return [adamw, muon]


def set_schedule(optimizers, config: Config, progress: float, step: int) -> None:
    """Trapezoid without a warm-up: full rates, then linearly down to final_lr over the last `warmdown` of the run."""
    left = min(1.0, (1.0 - progress) / max(config.warmdown, 1e-9))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (config.final_lr + (1 - config.final_lr) * left)
            if isinstance(optimizer, Muon):
                group["momentum"] = 0.85 + 0.10 * min(1.0, step / config.momentum_steps)
                group["weight_decay"] = config.matrix_decay * (1.0 - progress)


# ---------------------------------------------------------------------------
# Training


def train_step(loss_fn, optimizers, batches, accumulate: int, done=lambda part: None):
    """One optimizer step over `accumulate` micro-batches; returns their losses (accumulate,), on the device.

    done(part) is called after each of its parts: loader, forward_backward, optimizer.
    """
    losses = []
    for _ in range(accumulate):
        x, y = next(batches)
        done("loader")
        loss = loss_fn(x, y)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        done("forward_backward")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    done("optimizer")
    return torch.stack(losses)


class Stopwatch:
    """Milliseconds that each part of a step takes on the device."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.ms = {}
        self.wait()
        self.at = time.perf_counter()

    def __call__(self, part: str) -> None:
        self.wait()
        before, self.at = self.at, time.perf_counter()
        self.ms[f"{part}_ms"] = self.ms.get(f"{part}_ms", 0.0) + 1000 * (self.at - before)


def first_micro_rows(config: Config, profile) -> int:
    """Rows of the first forward pass to try; they divide the rows of a step."""
    step_rows = config.step_tokens // profile.max_seq_len
    rows = config.micro_rows or profile.micro_rows
    if not rows and profile.memory_gb:
        # Compiled, by torch's allocator at four sizes, within 3 %; 7 % for what it reserves besides (6 to 18 %), 1.5 GB for CUDA.
        row_gb = (0.037 + 8.05e-5 * config.n_layer * config.n_embd) * (2.4 if profile.dtype == "float32" else 1.0)
        rows = 2 ** int(math.log2(max(1.0, (0.92 * profile.memory_gb - 1.5) / (1.07 * row_gb))))
    rows = min(rows or 4, step_rows)
    while step_rows % rows:
        rows //= 2
    return rows


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the card's memory is used up: torch, its compiler and cuBLAS each have their own."""
    signs = ("out of memory", "OutOfMemoryError", "ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def warm_up(run, model, optimizers, loss_fn, config: Config, steps: int = 3) -> tuple[int, dict[str, float]]:
    """Runs a few steps so that everything is compiled and allocated, then undoes them in place.

    Returns micro_rows, and where the time of the last step went. Halves the micro-batch while it does not fit. The data order
    needs no undoing: it starts anew with each iterator.
    """
    saved = [p.detach().clone() for p in model.parameters()]
    generators = (torch.get_rng_state(), torch.cuda.get_rng_state() if run.device.type == "cuda" else None)
    step_rows, micro_rows = config.step_tokens // run.profile.max_seq_len, first_micro_rows(config, run.profile)
    while True:
        batches, failed = run.batches(run.train_rows, micro_rows), False
        try:
            for _ in range(steps):
                stopwatch = Stopwatch(run.device)
                train_step(loss_fn, optimizers, batches, step_rows // micro_rows, stopwatch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            failed = True  # handled outside, once the exception no longer holds the tensors
        batches.close()
        if not failed:
            break
        if micro_rows == 1:
            raise SystemExit("out of memory at one row: the model is too large for this card; lower n_layer or n_embd")
        micro_rows //= 2
        for p in model.parameters():
            p.grad = None
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        print(f"out of memory: {micro_rows} rows at a time", flush=True)
    with torch.no_grad():
        for p, before in zip(model.parameters(), saved, strict=True):
            p.copy_(before)
            p.grad = None
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
    torch.set_rng_state(generators[0])
    if generators[1] is not None:
        torch.cuda.set_rng_state(generators[1])
    return micro_rows, stopwatch.ms


if __name__ == "__main__":
    run = prepare.start()
    config = config_of(run.profile)
    with torch.device(run.device):
        model = build_model(run.profile)
    optimizers = build_optimizers(model, config, run.dtype, run.compile)
    loss_fn = torch.compile(model.loss, dynamic=False, fullgraph=True) if run.compile else model.loss
    micro_rows, step_ms = warm_up(run, model, optimizers, loss_fn, config)
    accumulate = config.step_tokens // run.profile.max_seq_len // micro_rows
    flops_per_token, text_tokens = model.flops_per_token(run.profile.max_seq_len), run.train_rows[:, 1:].size
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection stalls a step by up to half a second

    clock = run.start_clock(model)
    for ngrams in model.ngrams:
        ngrams.learn(run.train_rows)
    batches = run.batches(run.train_rows, micro_rows)  # of text: before the clock they were random tokens
    step, pending = 0, deque()
    in_flight = 3 if run.device.type == "cuda" else 0  # losses are read when the clock has seen their step end
    while not clock.expired:
        set_schedule(optimizers, config, clock.progress, step)
        if model.ngrams and step * config.step_tokens >= text_tokens:
            model.ngram_dropout.fill_(config.ngram_dropout)  # what was not seen before cannot be overfit
        losses = train_step(loss_fn, optimizers, batches, accumulate)
        pending.append(losses.to("cpu", non_blocking=True))  # into pinned memory: nothing waits here
        step += 1
        if len(pending) > in_flight:
            losses = pending.popleft().tolist()
            diverged = [loss for loss in losses if not loss < BLOW_UP]
            if diverged:
                raise SystemExit(f"\nloss {diverged[0]} at step {step - in_flight}: the run diverged")
            run.report(step, step * config.step_tokens, sum(losses) / len(losses), flops_per_token)
    run.finish(
        model,
        steps=step,
        tokens=step * config.step_tokens,
        micro_rows=micro_rows,
        flops_per_token=flops_per_token,
        backend=model.backend,
        step_ms=step_ms,
    )
