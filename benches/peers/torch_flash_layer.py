"""One FLASH layer of the package FLASH-pytorch, random weights: one JSON line with the time of a forward pass."""
import argparse
import json
import os
import statistics
import time

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--what", choices=["causal", "full"], default="causal")
p.add_argument("--n", type=int, default=2048)
p.add_argument("--dim", type=int, default=768)
p.add_argument("--chunk", type=int, default=256)
p.add_argument("--reps", type=int, default=5)
p.add_argument("--threads", type=int, default=1)
a = p.parse_args()
os.environ["OMP_NUM_THREADS"] = str(a.threads)

import torch
from flash_pytorch import FLASH
from rotary_embedding_torch import RotaryEmbedding

torch.set_num_threads(a.threads)
torch.manual_seed(1)
layer = FLASH(
    dim=a.dim, group_size=a.chunk, causal=a.what == "causal", rotary_pos_emb=RotaryEmbedding(dim=32)
).eval()
x = torch.randn(1, a.n, a.dim)
with torch.inference_mode():
    times = []
    for _ in range(2 + a.reps):
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
times = times[2:]
print(json.dumps({**vars(a), "median_s": statistics.median(times), "min_s": min(times)}))
