"""Backward of causal linear attention with one decay per head in PyTorch: autograd over chunked forward passes.

Prints one JSON line with the time of the forward pass with a graph, and of the backward pass alone.
  vec       all chunks at once, the scan of the states a loop
  scan      all chunks at once, the scan one product with the triangle of chunk decays
  loop      chunk by chunk
  compiled  `scan` under torch.compile (forward and backward)
"""
import argparse
import json
import time

import torch

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--n", type=int, default=2048)
p.add_argument("--heads", type=int, default=8)
p.add_argument("--dim", type=int, default=128)
p.add_argument("--chunk", type=int, default=128)
p.add_argument("--what", default="scan")
p.add_argument("--reps", type=int, default=5)
p.add_argument("--threads", type=int, default=1)
a = p.parse_args()
torch.set_num_threads(a.threads)
torch.set_flush_denormal(True)
torch.manual_seed(1)
H, N, D, C = a.heads, a.n, a.dim, min(a.chunk, a.n)
M = N // C
q, k, v, dout = (torch.randn(H, N, D) for _ in range(4))
q *= D ** -0.5
for t in (q, k, v):
    t.requires_grad_(True)
slope = torch.tensor([2.0 ** (-8.0 * (h + 1) / H) for h in range(H)]).view(H, 1, 1)
i = torch.arange(C, dtype=torch.float32)
up, down = torch.exp(-slope * (i + 1).view(1, C, 1)), torch.exp(-slope * (C - 1 - i).view(1, C, 1))
gap = i.view(C, 1) - i.view(1, C)
mask = torch.where(gap >= 0, torch.exp(-slope * gap.clamp(min=0)), torch.zeros(()))
step = torch.exp(-slope * C)
j = torch.arange(M, dtype=torch.float32)
far = j.view(M, 1) - j.view(1, M) - 1
scan = torch.where(far >= 0, torch.exp(-slope * C * far.clamp(min=0)), torch.zeros(()))


def parts():
    return (t.view(H, M, C, D) for t in (q, k, v))


def vec():
    Q, K, V = parts()
    S = (K * down.unsqueeze(1)).transpose(-1, -2) @ V
    state, before = torch.zeros(H, D, D), []
    for m in range(M):
        before.append(state)
        state = state * step + S[:, m]
    inter = (Q * up.unsqueeze(1)) @ torch.stack(before, 1)
    return ((Q @ K.transpose(-1, -2)) * mask.unsqueeze(1)) @ V + inter


def scanned():
    Q, K, V = parts()
    S = (K * down.unsqueeze(1)).transpose(-1, -2) @ V
    before = (scan @ S.reshape(H, M, D * D)).view(H, M, D, D)
    return ((Q @ K.transpose(-1, -2)) * mask.unsqueeze(1)) @ V + (Q * up.unsqueeze(1)) @ before


def loop():
    Q, K, V = parts()
    state, out = torch.zeros(H, D, D), []
    for m in range(M):
        x, y, z = Q[:, m], K[:, m], V[:, m]
        out.append(((x @ y.transpose(1, 2)) * mask) @ z + (x * up) @ state)
        state = state * step + (y * down).transpose(1, 2) @ z
    return torch.stack(out, 1)


f = {"vec": vec, "scan": scanned, "loop": loop, "compiled": torch.compile(scanned) if a.what == "compiled" else None}
f = f[a.what]
g = dout.view(H, M, C, D)


def once():
    for t in (q, k, v):
        t.grad = None
    start = time.perf_counter()
    out = f()
    middle = time.perf_counter()
    out.backward(g)
    return middle - start, time.perf_counter() - middle


for _ in range(2):
    once()
times = [once() for _ in range(a.reps)]
median = [sorted(t[i] for t in times)[len(times) // 2] for i in (0, 1)]
print(json.dumps({"what": a.what, "n": N, "heads": H, "dim": D, "chunk": C, "forward_s": median[0],
                  "backward_s": median[1], "backward_min_s": min(t[1] for t in times),
                  "backward_ns_per_token": median[1] / N * 1e9}))
