"""Images a second of the whole training step, beside the floor that the device's matrix products set, and PyTorch's.

    python benchmarks/train_step.py [--models NAME,...] [--mechanisms relu,dpa] [--batch_size 64] [--rounds 5]
        [--precision bfloat16] [--peer] [--json PATH]

The step is that of `activation_overhead.py`: forward, backward, optimiser, memories, on images that are on the device.
The floor is the time that its matrix products and convolutions take at the rate measured here for one large product,
the compiler's count of operations divided by it: no step is faster. ``--peer`` adds the same ViT or ResNet with ReLU
in PyTorch (the extra ``peers``): timm's and torchvision's models, AdamW, gradients clipped. There is no published
PyTorch DPA that could be run here, so mechanisms have no peer. All programs take turns in one process.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from activation_overhead import interleave, prepare, random_batch, training_step

MODELS = ("vit_tiny_patch4_32", "resnet18", "vit_tiny_patch16_224")


def matmul_rate(precision: str, size: int) -> float:
    """FLOP/s of a product of two square matrices, the best of ten."""
    a = jnp.ones((size, size), precision)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def flops(mechanism: str, args: argparse.Namespace, batch) -> float:
    """Operations of a step, by the compiler's count of the form whose blocks are no loop."""
    options = {"scan": False} if args.model.startswith("vit") else {}
    step, make_state = training_step(mechanism, args, **options)
    return jax.jit(step).lower(jax.eval_shape(make_state), batch).cost_analysis()["flops"]


class Peer:
    """The training step of the same model in PyTorch, in the place of a compiled program."""

    def __init__(self, args: argparse.Namespace):
        import timm
        import torch

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        if args.model == "resnet18":  # the form for 32 pixels: a 3 x 3 stem without pooling
            import torchvision

            model = torchvision.models.resnet18(num_classes=args.num_classes)
            model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = torch.nn.Identity()
        else:
            size, patch = (224, 16) if args.model.endswith("224") else (32, 4)
            sizes = {"img_size": size, "patch_size": patch, "embed_dim": 192, "depth": 12, "num_heads": 3}
            model = timm.models.VisionTransformer(**sizes, num_classes=args.num_classes, act_layer=torch.nn.ReLU)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        self.dtype = getattr(torch, args.precision)
        self.data = None

    def __call__(self, state, batch):
        torch = self.torch
        if self.data is None:
            images = torch.from_numpy(np.asarray(batch.inputs).transpose(0, 3, 1, 2).copy()).to(self.device)
            self.data = images, torch.from_numpy(np.array(batch.labels)).long().to(self.device)
        images, labels = self.data
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(self.model(images.float() / 255), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return state, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--mechanisms", default="relu,dpa,dnrt,aiec,gelu")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matmul_size", type=int, default=2048 if jax.default_backend() == "cpu" else 8192)
    parser.add_argument("--peer", action="store_true", help="PyTorch's step, too")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, Python {platform.python_version()}, {args.precision}, "
          f"batch {args.batch_size}, {args.rounds} rounds of 5 steps")  # fmt: skip
    print("| model | program | step, ms | images/s | GFLOP | floor, ms | floor / step |")
    print("|---|---|---:|---:|---:|---:|---:|")
    rows, rate = [], 0.0
    models, mechanisms = args.models.split(","), args.mechanisms.split(",")
    for args.model in models:
        rate = max(rate, matmul_rate(args.precision, args.matmul_size))
        batch = jax.device_put(random_batch(args))
        programs = {name: prepare(name, args, batch) for name in mechanisms}
        counts = {name: flops(name, args, batch) for name in mechanisms}
        if args.peer:
            programs["PyTorch, relu"] = (Peer(args), 0, 0.0, None)
        for name, seconds in interleave(programs, batch, args.rounds).items():
            step = 1e3 * statistics.median(seconds)
            gflop = counts[name] / 1e9 if name in counts else None
            floor = None if gflop is None else 1e12 * gflop / rate
            row = {"step_ms": step, "images_per_second": 1e3 * args.batch_size / step, "gflop": gflop}
            rows.append({"model": args.model, "program": name, **row, "floor_ms": floor})
            account = ["", "", ""] if floor is None else [f"{gflop:,.1f}", f"{floor:,.1f}", f"{floor / step:.2f}"]
            cells = [args.model, name, f"{step:,.1f}", f"{1e3 * args.batch_size / step:,.0f}", *account]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"one matrix product of {args.matmul_size}: {rate / 1e9:,.0f} GFLOP/s")
    if args.json:
        with open(args.json, "w") as file:
            given = {name: value for name, value in vars(args).items() if name not in ("model", "json")}
            json.dump(
                {"device": device, "jax": jax.__version__, "flop_per_second": rate, **given, "results": rows}, file
            )


if __name__ == "__main__":
    main()
