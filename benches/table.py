#!/usr/bin/env python3
"""Times the crate beside other libraries and prints the tables of docs/performance.md.

    cargo build --release --example measure
    python3 benches/table.py [--peers DIR] [--rounds 3] [--only lightning,decode,...]

DIR holds scripts for other libraries that take the same flags as `measure` and print one JSON line: those of benches/peers, and
torch_lightning.py, ort_lightning.py, torch_decode.py, torch_noncausal.py, torch_flash_gau.py, gemm_py.py. Programs run in turn, so that
a noisy machine is equally noisy for all of them; figures are medians over the rounds, with the range of the crate's ratio to the best
peer of the same round.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("--peers")
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--reps", type=int, default=5)
p.add_argument("--only", default="")
a = p.parse_args()
MEASURE = os.path.join(os.path.dirname(HERE), "target", "release", "examples", "measure")


def run(command):
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(out.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        sys.exit(f"{' '.join(command)} failed:\n{out.stderr}")


def ours(what, **flags):
    command = [MEASURE, "--what", what, "--reps", str(a.reps)]
    for k, v in flags.items():
        command += [f"--{k}"] if v is True else [f"--{k}", str(v)]
    return run(command)


def peer(script, what, **flags):
    command = [sys.executable, os.path.join(a.peers, script), "--what", what, "--reps", str(a.reps)]
    for k, v in flags.items():
        command += [f"--{k}", str(v)]
    return run(command)


def compare(name, mine, others, key, larger=False, scale=1.0):
    """One row: our medians, the best peer, the ratio (above 1: we are faster)."""
    rounds = []
    for _ in range(a.rounds):
        got = {k: f()[key] * scale for k, f in {**mine, **others}.items()}
        rounds.append(got)
    med = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    pick = max if larger else min
    show = lambda x: f"{x:.0f}" if x >= 100 else f"{x:.3g}"
    cells = [name] + [show(med[k]) for k in mine]
    if others:
        best = pick(others, key=lambda k: med[k])
        cells += [f"{show(med[best])} ({best})"]
        for k in mine:
            ratios = [(r[k] / pick(r[o] for o in others)) ** (1 if larger else -1) for r in rounds]
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"]
    print("| " + " | ".join(cells) + " |", flush=True)


def header(title, *columns):
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def wanted(name):
    return not a.only or name in a.only.split(",")


cal = ours("gemm", m=256, k=128, n=256)
print(f"`{cal['kernel']}`, multiply-adds from registers {cal['fma_gflops']:.0f} GFLOP/s")
peers = bool(a.peers)
if wanted("lightning"):
    columns = ["D, N", "bthd", "bhtd"] + (["best peer", "ratio bthd", "ratio bhtd"] if peers else [])
    header("Lightning Attention, 8 heads, f32, one thread: ns per token", *columns)
    for dim in (64, 128):
        for n in (2048, 8192, 16384, 32768, 65536):
            mine = {x: (lambda x=x: ours("lightning", dim=dim, n=n, layout=x)) for x in ("bthd", "bhtd")}
            others = {}
            if peers and n <= 32768:
                for b in (64, 128):
                    others[f"torch loop {b}"] = lambda b=b: peer("torch_lightning.py", "loop", dim=dim, n=n, block=b)
                if n <= 8192:
                    others["torch vec 64"] = lambda: peer("torch_lightning.py", "vec", dim=dim, n=n, block=64)
            compare(f"{dim}, {n}", mine, others, "ns_per_token")
if wanted("ort") and peers:
    header("The same against the fused operator of ONNX Runtime", "D, N", "bthd", "operator", "ratio")
    for dim in (64, 128):
        for n in (2048, 8192):
            others = {"op": lambda: peer("ort_lightning.py", "op", dim=dim, n=n)}
            compare(f"{dim}, {n}", {"bthd": lambda: ours("lightning", dim=dim, n=n)}, others, "ns_per_token")
if wanted("engines"):
    columns = ["D", "f32", "Bf16x3", "Bf16, bf16 tensors"] + (["best peer in bf16", "ratio f32", "ratio Bf16x3", "ratio Bf16"] if peers else [])
    header("Lightning Attention by engine, 8 heads, N = 8192, one thread: ns per token", *columns)
    for dim in (64, 128):
        kinds = {"f32": ("f32", "f32"), "bf16x3": ("f32", "bf16x3"), "bf16": ("bf16", "bf16")}
        mine = {k: (lambda d=d, p=p: ours("lightning", dim=dim, n=8192, dtype=d, precision=p)) for k, (d, p) in kinds.items()}
        others = {}
        if peers:
            for w, b in (("loop", 64), ("loop", 128), ("vec", 64)):
                others[f"torch {w} {b}"] = lambda w=w, b=b: peer("torch_lightning.py", w, dim=dim, n=8192, block=b, dtype="bf16")
        compare(f"{dim}", mine, others, "ns_per_token")
if wanted("threads"):
    header("Lightning Attention on two threads, N = 16384: speed-up", "D, heads", "1 thread, ns per token", "2 threads", "speed-up")
    for dim in (64, 128):
        for heads in (8, 1):
            one, two = [], []
            for _ in range(a.rounds):
                flags = dict(dim=dim, heads=heads, n=16384, layout="bhtd")
                one.append(ours("lightning", core=-1, **flags)["ns_per_token"])
                two.append(ours("lightning", threads=2, **flags)["ns_per_token"])
            ratio = statistics.median(x / y for x, y in zip(one, two))
            print(f"| {dim}, {heads} | {statistics.median(one):.0f} | {statistics.median(two):.0f} | {ratio:.2f} |", flush=True)
if wanted("decode"):
    columns = ["batch", "us per step", "GB/s", "plain loop GB/s", "share"] + (["best peer, us", "ratio"] if peers else [])
    header("Decode step, 16 heads, D = 128, f32, one thread", *columns)
    for batch in (1, 8):
        rows = []
        for _ in range(a.rounds):
            m = ours("lightning_decode", heads=16, dim=128, batch=batch)
            o = [peer("torch_decode.py", w, batch=batch) for w in ("ops", "addcmul")] if peers else []
            rows.append((m["median_s"] * 1e6, m["gbytes_per_s_rw"], m["loop_gbytes_per_s_rw"], min((x["median_s"] * 1e6 for x in o), default=0)))
        us, rate, loop, best = (statistics.median(c) for c in zip(*rows))
        share = statistics.median(r[1] / r[2] for r in rows)
        cells = [f"{batch}", f"{us:.1f}", f"{rate:.0f}", f"{loop:.0f}", f"{share:.2f}"]
        cells += [f"{best:.1f}", f"{statistics.median(r[3] / r[0] for r in rows):.2f}"] if peers else []
        print("| " + " | ".join(cells) + " |", flush=True)
if wanted("silence"):
    header("100 000 zero tokens after live ones, relative to live ones (8 heads, D = 64)", "prefill", "decode")
    r = ours("silence", dim=64)
    print(f"| {r['silent_prefill']:.2f} | {r['silent_decode']:.2f} |", flush=True)
if wanted("crossover"):
    header("Where linear overtakes causal softmax attention (8 heads, D = 64): ns per token", "N", "softmax", "lightning")
    for n in (64, 128, 256, 512, 1024, 2048):
        mine = {"softmax": lambda: ours("softmax", n=n, dim=64, causal=True), "lightning": lambda: ours("lightning", n=n, dim=64)}
        compare(f"{n}", mine, {}, "ns_per_token")
if wanted("noncausal"):
    columns = ["N", "linear (elu + 1)", "softmax"] + (["torch linear", "torch softmax"] if peers else [])
    header("Not causal, 8 heads, D = 64, f32, one thread: ns per token", *columns)
    for n in (1024, 3136):
        fs = [lambda: ours("linear_noncausal", n=n, dim=64), lambda: ours("softmax", n=n, dim=64)]
        if peers:
            fs += [lambda: peer("torch_noncausal.py", "elu", n=n, heads=8, dim=64), lambda: peer("torch_noncausal.py", "sdpa", n=n, heads=8, dim=64)]
        med = [statistics.median(f()["ns_per_token"] for _ in range(a.rounds)) for f in fs]
        print(f"| {n} | " + " | ".join(f"{x:.0f}" for x in med) + " |", flush=True)
if wanted("vision"):
    columns = ["core, N", "crate"] + (["best peer", "ratio"] if peers else [])
    header("Cores of vision models, 8 heads, D = 64, 49 agents, f32, one thread: us per call", *columns)
    for what, names in (("agent", ("agent", "agent_sdpa")), ("focused", ("focused", "focused_c")), ("linear_noncausal", ("elu",)), ("softmax", ("sdpa",))):
        for n in (784, 3136, 12544):
            if what == "softmax" and n > 3136:
                continue
            others = {}
            if peers:
                others = {f"torch {w}": (lambda w=w: peer("torch_noncausal.py", w, n=n, heads=8, dim=64)) for w in names}
            compare(f"{what}, {n}", {"crate": lambda: ours(what, n=n, dim=64)}, others, "median_s", scale=1e6)
if wanted("vision_models"):
    columns = ["model, px", "crate"] + (["best peer", "ratio"] if peers else [])
    header("Vision models, batch 1, f32, one thread: ms per image", *columns)
    models = ("deit_t", "deit_s", "agent_deit_t", "agent_deit_s", "swin_t", "agent_swin_t", "flatten_swin_t")
    for what, res in [(m, 224) for m in models] + [("deit_s", 448), ("agent_deit_s", 448)]:
        for mode in ("eager", "ort") if peers else (None,):
            others = {mode: lambda: peer("torch_vision.py", what, res=res, mode=mode)} if mode else {}
            compare(f"{what}, {res}", {"crate": lambda: ours(what, res=res)}, others, "median_s", scale=1e3)
if wanted("flash"):
    columns = ["core, N", "crate"] + (["best peer", "ratio"] if peers else [])
    header("Cores of FLASH and GAU, chunks of 256, s = 128, e = 1536, f32, one thread: ms per call", *columns)
    rows = (("mixed_chunk", True, ("mixed_loop", "mixed_causal")), ("mixed_chunk", False, ("mixed",)), ("gau", False, ("gau_quad",)))
    for what, causal, names in rows:
        for n in (2048, 8192) if what == "mixed_chunk" else (2048,):
            flags = dict(n=n, causal=True) if causal else dict(n=n)
            others = {}
            if peers:
                others = {f"torch {w}": (lambda w=w: peer("torch_flash_gau.py", w, n=n)) for w in names}
            label = f"{what}{', causal' if causal else ''}, {n}"
            compare(label, {"crate": lambda: ours(what, **flags)}, others, "median_s", scale=1e3)
    header("FLASH layer of width 768, f32, one thread: ms per call", *columns)
    for n in (2048, 8192):
        others = {"package": lambda: peer("torch_flash_layer.py", "causal", n=n)} if peers else {}
        compare(f"causal, {n}", {"crate": lambda: ours("flash_layer", n=n, causal=True)}, others, "median_s", scale=1e3)
if wanted("backward"):
    header("Backward passes, f32, one thread: ms per call", "operation, N", "forward", "backward", "backward / forward")
    rows = (("lightning", 2048, dict(dim=128)), ("lightning", 8192, dict(dim=128)), ("linear", 2048, dict(dim=64)), ("softmax", 1024, dict(dim=64)),
            ("agent", 3136, dict(dim=64)), ("mixed_chunk", 2048, {}), ("quadratic", 2048, {}))
    names = {"linear": "linear_noncausal", "quadratic": "gau"}
    for what, n, flags in rows:
        mine = {"forward": lambda: ours(names.get(what, what), n=n, **flags), "backward": lambda: ours(f"{what}_backward", n=n, **flags)}
        got = [{k: f()["median_s"] * 1e3 for k, f in mine.items()} for _ in range(a.rounds)]
        cells = [f"{statistics.median(r[k] for r in got):.3g}" for k in mine]
        print(f"| {what}, {n} | " + " | ".join(cells) + f" | {statistics.median(r['backward'] / r['forward'] for r in got):.1f} |", flush=True)
if wanted("gemm"):
    columns = ["m x k x n", "packed", "unpacked"] + (["best peer", "ratio packed", "ratio unpacked"] if peers else [])
    header("Products in f32, one thread: GFLOP/s", *columns)
    for m, k, n in ((64, 64, 64), (128, 128, 128), (256, 128, 256), (1024, 1024, 1024)):
        mine = {"packed": lambda: ours("gemm", m=m, k=k, n=n, packed=True), "unpacked": lambda: ours("gemm", m=m, k=k, n=n)}
        others = {}
        if peers:
            others["torch"] = lambda: peer("gemm_py.py", "torch", m=m, k=k, n=n)
            others["torch bmm"] = lambda: peer("gemm_py.py", "torch_bmm", m=m, k=k, n=n, bmm=2 if m == 1024 else 64)
        compare(f"{m} x {k} x {n}", mine, others, "gflops", larger=True)
if wanted("model"):
    header("Decoding with a 385M model in f32, one thread", "tokens/s", "weights GB/s", "plain read GB/s")
    r = ours("generate_decode", config="385m")
    print(f"| {r['tokens_per_s']:.1f} | {r['weight_gbytes_per_s']:.1f} | {r['read_gbytes_per_s']:.1f} |", flush=True)
