"""Vision transformers in PyTorch and ONNX Runtime: batch 1, random weights, one JSON line with the time of a forward pass.

  deit_t, deit_s, swin_t        as timm builds them
  agent_deit_t, agent_deit_s    the same with agent attention in every block, position biases formed beforehand
  agent_swin_t, flatten_swin_t  their softmax twin swin_t, which has the same multiply-adds
Modes: eager; ort, the same graph exported to ONNX.
"""
import argparse
import io

import timing

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
names = ["deit_t", "deit_s", "agent_deit_t", "agent_deit_s", "swin_t", "agent_swin_t", "flatten_swin_t"]
p.add_argument("--what", choices=names, default="deit_t")
p.add_argument("--res", type=int, default=224)
p.add_argument("--mode", choices=["eager", "ort"], default="eager")
a = timing.arguments(p)

import timm
import torch
from torch import nn


class AgentAttention(nn.Module):
    def __init__(self, dim, heads, side, agents=7):
        super().__init__()
        self.heads, self.side, n, m = heads, side, side * side + 1, agents * agents
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.pool = nn.AdaptiveAvgPool2d(agents)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.register_buffer("agents_bias", torch.randn(1, heads, m, n))
        self.register_buffer("queries_bias", torch.randn(1, heads, n, m))

    def forward(self, x, **_):
        b, n, c = x.shape
        split = lambda t: t.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)
        square = lambda t: t[:, 1:].transpose(1, 2).reshape(b, c, self.side, self.side)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = split(self.pool(square(q)).flatten(2).transpose(1, 2))
        local = self.dwc(square(v)).flatten(2).transpose(1, 2)
        q, k, v = split(q), split(k), split(v)
        summed = torch.softmax(self.scale * agents @ k.transpose(-2, -1) + self.agents_bias, dim=-1) @ v
        out = torch.softmax(self.scale * q @ agents.transpose(-2, -1) + self.queries_bias, dim=-1) @ summed
        out = out.transpose(1, 2).reshape(b, n, c)
        return self.proj(torch.cat([out[:, :1], out[:, 1:] + local], dim=1))


if "swin" in a.what:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=a.res)
else:
    size = {"t": "tiny", "s": "small"}[a.what[-1]]
    model = timm.create_model(f"deit_{size}_patch16_224", img_size=a.res)
    if a.what.startswith("agent"):
        for block in model.blocks:
            block.attn = AgentAttention(model.embed_dim, block.attn.num_heads, a.res // 16)
model.eval()
x = torch.randn(1, 3, a.res, a.res)
if a.mode == "eager":
    run = lambda: model(x)
else:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = a.threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    run = lambda: session.run(None, feed)
timing.report(a, run)
