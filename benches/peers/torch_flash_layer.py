"""One FLASH layer of the package FLASH-pytorch, random weights: one JSON line with the time of a forward pass."""
import argparse

import timing

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--what", choices=["causal", "full"], default="causal")
p.add_argument("--n", type=int, default=2048)
p.add_argument("--dim", type=int, default=768)
p.add_argument("--chunk", type=int, default=256)
a = timing.arguments(p)

import torch
from flash_pytorch import FLASH
from rotary_embedding_torch import RotaryEmbedding

layer = FLASH(
    dim=a.dim, group_size=a.chunk, causal=a.what == "causal", rotary_pos_emb=RotaryEmbedding(dim=32)
).eval()
x = torch.randn(1, a.n, a.dim)
timing.report(a, lambda: layer(x))
