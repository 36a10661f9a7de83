"""The models for 224 pixels beside timm's and torchvision's with the same weights: logits, and time of a forward pass.

    pip install -e '.[train,peers]'
    python benchmarks/peers.py [--models NAME,...] [--batch_size 4] [--rounds 10]

Every peer is made with random weights, and gets running statistics of one random batch; its state dict is loaded here.
Forward passes of the two are timed in turn, each on all cores. PVT has no peer: timm has its second version only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

import dpa_jax

CLASSES = 10
PEERS = {
    "alexnet_224": ("torchvision", "alexnet"),
    "cait_xxs24_patch16_224": ("timm", "cait_xxs24_224"),
    "deit_tiny_patch16_224": ("timm", "deit_tiny_distilled_patch16_224"),
    "mobilenet_v1_224": ("timm", "mobilenetv1_100"),
    "mobilenet_v2_224": ("torchvision", "mobilenet_v2"),
    "resnet18_224": ("torchvision", "resnet18"),
    "shufflenet_v2_224": ("torchvision", "shufflenet_v2_x1_0"),
    "tnt_small_patch16_224": ("timm", "tnt_s_legacy_patch16_224"),
    "vgg11_224": ("torchvision", "vgg11"),
    "vgg11_bn_224": ("torchvision", "vgg11_bn"),
    "vit_tiny_patch16_224": ("timm", "vit_tiny_patch16_224"),
}
_OPTIONS = {"mobilenet_v1_224": {"native": dpa_jax.activation("relu6")}}  # the paper has ReLU


def both(name: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """The forward passes of a model and of its peer with the same weights: images [B, 224, 224, 3] -> logits [B, K]."""
    import timm
    import torch
    import torchvision

    library, peer_name = PEERS[name]
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    peer = make(peer_name, num_classes=CLASSES)
    images = np.random.default_rng(1).normal(size=(8, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        peer.train()(torch.from_numpy(images))
    peer.eval()

    model = dpa_jax.models.create(name, CLASSES, **_OPTIONS.get(name, {}))
    variables = dpa_jax.models.variables_from_torch(model, peer.state_dict())
    apply = jax.jit(model.apply)

    def ours(images: np.ndarray) -> np.ndarray:
        return np.asarray(apply(variables, images))

    def theirs(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return peer(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()

    return ours, theirs


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of the logits, in units of the largest logit."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PEERS))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    images = np.random.default_rng(0).normal(size=(args.batch_size, 224, 224, 3)).astype(np.float32)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {args.batch_size}")
    print(
        "| model | peer | largest difference | forward ms | peer's ms | ratio |\n|---|---|---:|---:|---:|---:|",
        flush=True,
    )
    for name in args.models.split(","):
        programs = both(name)
        apart = difference(*(program(images) for program in programs))
        seconds: list[list[float]] = []
        for _ in range(args.rounds):
            seconds.append([])
            for program in programs:
                begin = time.perf_counter()
                program(images)
                seconds[-1].append(1e3 * (time.perf_counter() - begin))
        ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
        ratio = statistics.median(a / b for a, b in seconds)
        print(
            f"| {name} | {'.'.join(PEERS[name])} | {apart:.1e} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
