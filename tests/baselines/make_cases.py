#!/usr/bin/env python3
"""Writes the case files of the softmax baselines: model.deit and model.swin from timm, model.pvt from a plain module.

    pip install torch timm safetensors
    python3 tests/baselines/make_cases.py

Random weights, all arithmetic in double precision, tensors under the names of the original code.
"""
import json
import os

import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CASES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cases")


class PvtAttention(nn.Module):
    def __init__(self, dim, heads, grid, ratio, bias):
        super().__init__()
        self.heads, self.grid, self.ratio = heads, grid, ratio
        self.q = nn.Linear(dim, dim, bias)
        self.kv = nn.Linear(dim, 2 * dim, bias)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        b, n, c = x.shape
        t = x
        if self.ratio > 1:
            t = self.sr(x.transpose(1, 2).reshape(b, c, *self.grid))
            t = self.norm(t.flatten(2).transpose(1, 2))
        q, k, v = (y.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)
                   for y in (self.q(x), *self.kv(t).chunk(2, -1)))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class PvtBlock(nn.Module):
    def __init__(self, dim, heads, grid, ratio, hidden, bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = PvtAttention(dim, heads, grid, ratio, bias)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Pvt(nn.Module):
    def __init__(self, c):
        super().__init__()
        inputs, side, self.stages = c["in_chans"], c["img_size"], len(c["embed_dims"])
        for s, dim in enumerate(c["embed_dims"]):
            stride = c["patch_size"] if s == 0 else 2
            side //= stride
            embed = nn.Module()
            embed.proj, embed.norm = nn.Conv2d(inputs, dim, stride, stride), nn.LayerNorm(dim)
            hidden = int(dim * c["mlp_ratios"][s])
            blocks = [PvtBlock(dim, c["num_heads"][s], (side, side), c["sr_ratios"][s], hidden, c["qkv_bias"])
                      for _ in range(c["depths"][s])]
            setattr(self, f"patch_embed{s + 1}", embed)
            setattr(self, f"pos_embed{s + 1}", nn.Parameter(torch.zeros(1, side * side, dim)))
            setattr(self, f"block{s + 1}", nn.ModuleList(blocks))
            inputs = dim
        self.head = nn.Linear(inputs, c["num_classes"])

    def forward_features(self, x):
        for s in range(1, self.stages + 1):
            embed = getattr(self, f"patch_embed{s}")
            x = embed.proj(x)
            b, c, h, w = x.shape
            x = embed.norm(x.flatten(2).transpose(1, 2)) + getattr(self, f"pos_embed{s}")
            for block in getattr(self, f"block{s}"):
                x = block(x)
            if s < self.stages:
                x = x.transpose(1, 2).reshape(b, c, h, w)
        return x.mean(1)


def swin_names(state):
    """timm puts a merging into the stage behind it and wraps the head."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        out[".".join(parts).replace("head.fc.", "head.")] = value
    return out


def write(name, config, net, features, reference, names=lambda s: s, seed=1):
    torch.manual_seed(seed)
    net = net.double().eval()
    with torch.no_grad():
        for key, p in net.named_parameters():
            norm = "norm" in key and key.endswith("weight")
            p.copy_(torch.randn(p.shape).float().double() * (0.1 if norm or p.dim() == 1 else 0.2) + float(norm))
        # Weights and input are exact in single precision, so that only arithmetic differs.
        for p in net.parameters():
            p.copy_(p.float().double())
        image = torch.randn(config["batch"], 3, config["img_size"], config["img_size"]).float()
        feats = features(net, image.double())
        logits = net.head.fc(feats) if hasattr(net.head, "fc") else net.head(feats)
        single = net.float()(image) if not isinstance(net, Pvt) else net.float().head(net.forward_features(image))
        error = float((single.double() - logits).norm() / logits.norm())
    skip = ("attn_mask", "relative_position_index")
    state = {k: v for k, v in names(net.state_dict()).items() if not k.endswith(skip)}
    tensors = {f"w.{k}": v.float().contiguous() for k, v in state.items()}
    tensors |= {"in.image": image, "out.features": feats.float(), "out.logits": logits.float()}
    system, path = name.split("__")[0], os.path.join(CASES, name + ".safetensors")
    save_file(tensors, path, {
        "system": system, "config": json.dumps(config, sort_keys=True), "reference": reference,
        "tolerance": "2e-05", "f32_reference_error": f"{error:.2e}"})
    print(name, os.path.getsize(path), "bytes, single precision is off by", error)


COMMON = {"in_chans": 3, "num_classes": 10, "qkv_bias": True}


def deit(name, **more):
    c = COMMON | {"mlp_ratio": 2.0, "norm_eps": 1e-6} | more
    net = timm.models.vision_transformer.VisionTransformer(
        img_size=c["img_size"], patch_size=c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"],
        num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], num_classes=c["num_classes"], qkv_bias=c["qkv_bias"])
    write(name, c, net, lambda n, x: n.forward_head(n.forward_features(x), pre_logits=True),
          f"timm {timm.__version__}, VisionTransformer, float64")


def swin(name, **more):
    c = COMMON | {"mlp_ratio": 2.0, "norm_eps": 1e-5} | more
    net = timm.models.swin_transformer.SwinTransformer(
        img_size=c["img_size"], patch_size=c["patch_size"], embed_dim=c["embed_dim"], depths=c["depths"],
        num_heads=c["num_heads"], window_size=c["window_size"], mlp_ratio=c["mlp_ratio"],
        num_classes=c["num_classes"], qkv_bias=c["qkv_bias"])
    write(name, c, net, lambda n, x: n.forward_head(n.forward_features(x), pre_logits=True),
          f"timm {timm.__version__}, SwinTransformer, float64", swin_names)


def pvt(name, **more):
    c = COMMON | {"patch_size": 4, "norm_eps": 1e-6, "inner_norm_eps": 1e-5} | more
    write(name, c, Pvt(c), lambda n, x: n.forward_features(x), "plain PyTorch module, float64")


deit("model.deit__two_images", batch=2, img_size=40, patch_size=8, embed_dim=36, depth=2, num_heads=3)
swin("model.swin__shifted", batch=2, img_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
     window_size=4)
swin("model.swin__one_window", batch=1, img_size=56, patch_size=4, embed_dim=12, depths=[2, 1], num_heads=[3, 3],
     window_size=7, qkv_bias=False)
pvt("model.pvt__reduced", batch=2, img_size=64, embed_dims=[8, 12, 16, 24], depths=[1, 1, 1, 1],
    num_heads=[1, 2, 2, 3], mlp_ratios=[3, 2, 2, 2], sr_ratios=[4, 2, 2, 1])
