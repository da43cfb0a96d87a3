"""The same training in PyTorch: what `train` is measured against.

    cargo run --release --features candle --example train -- --init-only --out DIR
    python3 examples/train/peer.py --init DIR/model.safetensors

Matched exactly: the initial weights and the configuration, which are read from the file; the order of the data, which is
computed from the seed as `text.rs` does; the schedule, AdamW and the length of gradients; the text, which must be the same
files. Lightning attention is computed as two products with a table of decays between, or in chunks (`--chunk`), which is
slower for short sequences; softmax attention by PyTorch's own operation; mixed chunk attention for all chunks at once.
"""

import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open

MASK = (1 << 64) - 1


class Rng:
    """SplitMix64."""

    def __init__(self, seed):
        self.state = seed & MASK

    def below(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        return ((z ^ z >> 31) * n) >> 64


def read_text(path):
    root = pathlib.Path(__file__).resolve().parents[2]
    files = [path] if path else [root / "README.md"]
    if not path:
        for folder in ["docs", "docs/math"]:
            files += sorted((root / folder).glob("*.md"))
    data = b"".join(pathlib.Path(f).read_bytes() for f in files)
    cut = len(data) - len(data) // 20
    return [torch.tensor(list(part)) for part in (data[:cut], data[cut:])]


def stack(text, starts, n):
    return torch.stack([text[s : s + n + 1] for s in starts])


def alibi(heads):
    powers = lambda n: [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]
    below = 1 << (heads.bit_length() - 1)
    return (powers(heads) if below == heads else powers(below) + powers(2 * below)[::2])[:heads]


def srms(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class TransNormer:
    def __init__(self, config, weights, chunk):
        self.w, self.chunk = weights, chunk
        self.layers, self.heads = config["decoder_layers"], config["decoder_attention_heads"]
        self.hidden, self.width = config["hidden_dim"], config["decoder_embed_dim"]
        self.scale = 1.0 if config["no_scale_embedding"] else math.sqrt(self.width)
        depth = lambda l: l / (self.layers - 1) if self.layers > 1 else 0.0
        self.slopes = [
            torch.tensor([s * (1 - depth(l) + 1e-5) for s in alibi(self.heads)], dtype=torch.float64)
            for l in range(self.layers)
        ]
        self.tables = {}

    def trainable(self, _):
        return True

    def lightning(self, q, k, v, layer):
        n, slopes = q.shape[2], self.slopes[layer]
        c = min(self.chunk or n, n)
        if (layer, c) not in self.tables:
            t = torch.arange(c, dtype=torch.float64)
            gap = t[:, None] - t[None, :]
            table = torch.where(gap >= 0, torch.exp(-slopes[:, None, None] * gap), 0.0)
            ahead = torch.exp(-slopes[:, None] * (t + 1))[..., None]
            behind = torch.exp(-slopes[:, None] * (c - 1 - t))[..., None]
            whole = torch.exp(-slopes * c)[:, None, None]
            self.tables[layer, c] = [x.float() for x in (table, ahead, behind, whole)]
        table, ahead, behind, whole = self.tables[layer, c]
        if c == n:
            return (q @ k.mT * table) @ v
        assert n % c == 0, "the chunk must divide the length"
        out, state = [], 0.0
        for q, k, v in zip(q.split(c, 2), k.split(c, 2), v.split(c, 2)):
            part = (q @ k.mT * table) @ v
            out.append(part + (q * ahead) @ state if len(out) else part)
            state = whole * state + (k * behind).mT @ v
        return torch.cat(out, 2)

    def __call__(self, tokens):
        w, heads = self.w, self.heads
        table = w["model.embed_tokens.weight"]
        x = F.embedding(tokens, table) * self.scale
        batch, n, _ = x.shape
        for l in range(self.layers):
            name = f"model.layers.{l}."
            q, k, v, u = (srms(x, 1e-6) @ w[name + "token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
            split = lambda x: x.view(batch, n, heads, -1).transpose(1, 2)
            q, k, v = split(F.silu(q)), split(F.silu(k)), split(v)
            theta = w.get(name + "token_mixer.lrpe.theta")
            if theta is not None:
                angle = theta * torch.arange(n, dtype=torch.float32)[None, :, None]
                turn = lambda x: torch.cat([x * angle.cos(), x * angle.sin()], -1)
                q, k = turn(q), turn(k)
            mixed = self.lightning(q, k, v, l).transpose(1, 2).reshape(batch, n, -1)
            x = x + (srms(mixed, 1e-6) * u) @ w[name + "token_mixer.out_proj.weight"].T
            y = srms(x, 1e-6)
            l1, l2, l3 = (w[f"{name}channel_mixer.l{i}.weight"] for i in (1, 2, 3))
            x = x + (y @ l1.T * (y @ l2.T)) @ l3.T
        return srms(x, 1e-6) @ table.T


class Transformer:
    """Transformer++: RMSNorm, SwiGLU, rotary positions over halves of a head."""

    def __init__(self, config, weights, _):
        self.w, self.layers, self.heads = weights, config["layers"], config["heads"]
        self.eps = config.get("eps", 1e-6)

    def trainable(self, _):
        return True

    def norm(self, x, name):
        return srms(x, self.eps) * self.w[name + ".weight"]

    def __call__(self, tokens):
        w, heads = self.w, self.heads
        x = F.embedding(tokens, w["embed.weight"])
        batch, n, width = x.shape
        half = width // heads // 2
        freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(n, dtype=torch.float64)[:, None] * freq).float()
        cos, sin = angle.cos(), angle.sin()

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        for l in range(self.layers):
            name = f"layers.{l}."
            y = self.norm(x, name + "norm1")
            split = lambda m: (y @ w[name + m + ".weight"].T).view(batch, n, heads, -1).transpose(1, 2)
            q, k, v = turn(split("wq")), turn(split("wk")), split("wv")
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(batch, n, -1) @ w[name + "wo.weight"].T
            y = self.norm(x, name + "norm2")
            inner = F.silu(y @ w[name + "w_gate.weight"].T) * (y @ w[name + "w_up.weight"].T)
            x = x + inner @ w[name + "w_down.weight"].T
        return self.norm(x, "norm") @ w["embed.weight"].T


class Flash:
    """FLASH as a causal language model: ScaleNorm, shifted tokens, mixed chunk attention with a bias by distance."""

    def __init__(self, config, weights, _):
        self.w, self.layers, self.chunk = weights, config["depth"], config["group_size"]
        self.s, self.rotary = config["query_key_dim"], weights["layers.0.rotary_pos_emb.freqs"]
        i = torch.arange(self.chunk)
        gap = (i[:, None] - i[None, :]).clamp(min=0)
        ends = torch.tensor([19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113])
        self.bucket = torch.where(gap < 16, gap, 16 + torch.bucketize(gap, ends, right=True))
        self.mask = (i[:, None] >= i[None, :]).float()

    def trainable(self, name):
        return not name.endswith(("freqs", "inv_freq"))

    def attend(self, heads, v, name):
        table = self.w[name + "rel_pos_bias.relative_attention_bias.weight"]
        bias = table[:, 0][self.bucket] * math.sqrt(self.s)
        batch, n, e = v.shape
        assert n % self.chunk == 0, "chunks must divide the length"
        quad_q, lin_q, quad_k, lin_k = (x.reshape(batch, -1, self.chunk, self.s) for x in heads.unbind(2))
        v = v.reshape(batch, -1, self.chunk, e)
        scores = F.relu(quad_q @ quad_k.mT / self.chunk + bias).square() * self.mask
        sums = (lin_k.mT @ v / self.chunk).cumsum(1)
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
        return (scores @ v + lin_q @ before).reshape(batch, n, e)

    def __call__(self, tokens):
        w = self.w
        x = F.embedding(tokens, w["token_emb.weight"])
        batch, n, width = x.shape
        at = torch.arange(n, dtype=torch.float64)[:, None]
        angle = (at * w["abs_pos_emb.inv_freq"].double()).float()
        x = x + w["abs_pos_emb.scale"] * torch.cat([angle.sin(), angle.cos()], -1)
        angle = (at * self.rotary.double()).float()[:, None, :]
        cos, sin = angle.cos(), angle.sin()
        for l in range(self.layers):
            name = f"layers.{l}."
            linear = lambda x, part: F.linear(x, w[name + part + ".weight"], w[name + part + ".bias"])
            y = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-5) * w[name + "norm.g"]
            half = (width + 1) // 2
            y = torch.cat([F.pad(y[..., :half], (0, 0, 1, -1)), y[..., half:]], -1)
            v, gate = F.silu(linear(y, "to_hidden.0")).chunk(2, -1)
            z = F.silu(linear(y, "to_qk.0"))
            heads = z[:, :, None] * w[name + "qk_offset_scale.gamma"] + w[name + "qk_offset_scale.beta"]
            turned, rest = heads.split([2 * angle.shape[-1], self.s - 2 * angle.shape[-1]], -1)
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
            mixed = self.attend(torch.cat([turned, rest], -1), v, name)
            x = x + linear(gate * mixed, "to_out")
        x = F.layer_norm(x, (width,), w["to_logits.0.weight"], w["to_logits.0.bias"], 1e-5)
        return F.linear(x, w["to_logits.1.weight"], w["to_logits.1.bias"])


KINDS = {"transnormer": TransNormer, "transformer_pp": Transformer, "flash": Flash}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", required=True, help="what `train --init-only` wrote")
    p.add_argument("--text")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--len", type=int, default=256)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--stop", type=int, help="stops after this many steps of the schedule")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=30)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int)
    p.add_argument("--chunk", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    with safe_open(a.init, "pt") as f:
        config = json.loads(f.metadata()["config"])
        weights = {name: f.get_tensor(name) for name in f.keys()}
    model = KINDS[config["model_type"]](config, weights, a.chunk)
    learnt = [w.requires_grad_() for name, w in sorted(weights.items()) if model.trainable(name)]
    groups = [
        {"params": [w for w in learnt if w.dim() > 1], "weight_decay": a.weight_decay},
        {"params": [w for w in learnt if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.95), eps=1e-8)
    train, held = read_text(a.text)
    room = len(train) - a.len

    def loss_of(batch):
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    losses, start = [], time.time()
    for step in range(a.stop or a.steps):
        rng = Rng(a.seed * 0x2545F4914F6CDD1D + step)
        batch = stack(train, [rng.below(room) for _ in range(a.batch)], a.len)
        rate = a.lr * (step + 1) / a.warmup
        if step >= a.warmup:
            done = min(1.0, (step - a.warmup) / max(1, a.steps - a.warmup))
            rate = a.lr * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, a.clip)
        optimiser.step()
        losses.append(loss.item())
    seconds = time.time() - start
    last = losses[-20:]
    print("first losses " + " ".join(f"{x:.5f}" for x in losses[:3]))
    print(f"training loss {sum(last) / len(last):.4f} (mean of the last steps)")
    starts = [i * a.len for i in range(min(64, (len(held) - 1) // a.len))]
    with torch.no_grad():
        parts = [loss_of(stack(held, starts[i : i + a.batch], a.len)) for i in range(0, len(starts), a.batch)]
    print(f"held-out loss {sum(parts) / len(parts):.4f}")
    print(f"{len(losses) * a.batch * a.len / seconds:.0f} tokens/s, {torch.get_num_threads()} threads")


main()
