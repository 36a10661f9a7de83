"""Parameters from PyTorch: what is wrong in them is named. The recordings in test_vit.py are loaded by the same."""

import flax.linen as nn
import numpy as np
import pytest

import dpa_jax


def small():
    return dpa_jax.models.create("vit", 5, image_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3)


def torch_arrays():
    """Arrays under PyTorch names for `small()`, made from its shapes."""
    block = {
        "norm1.weight": (12,), "norm1.bias": (12,), "attn.qkv.weight": (36, 12), "attn.qkv.bias": (36,),
        "attn.proj.weight": (12, 12), "attn.proj.bias": (12,), "norm2.weight": (12,), "norm2.bias": (12,),
        "mlp.fc1.weight": (48, 12), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (12, 48), "mlp.fc2.bias": (12,),
    }  # fmt: skip
    shapes = {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 5, 12),
        "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "norm.weight": (12,),
        "norm.bias": (12,),
        "head.weight": (5, 12),
        "head.bias": (5,),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_params_from_torch_names_what_is_wrong():
    arrays = torch_arrays()
    fine = dpa_jax.models.params_from_torch(small(), arrays)
    assert fine["blocks"]["attention"]["qkv"]["kernel"].shape == (2, 12, 36)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(12, 7\).* wants \(12, 5\) for 'head.kernel'"):
        dpa_jax.models.params_from_torch(small(), {**arrays, "head.weight": np.zeros((7, 12))})
    with pytest.raises(ValueError, match=r"'blocks.2.norm1.weight' is no parameter of ViT"):
        dpa_jax.models.params_from_torch(small(), {**arrays, "blocks.2.norm1.weight": np.zeros(12)})
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.bias' has shape \(7,\).* wants \(36,\)"):
        dpa_jax.models.params_from_torch(small(), {**arrays, "blocks.1.attn.qkv.bias": np.zeros(7)})
    for missing in ("norm.bias", "blocks.1.mlp.fc1.weight"):
        others = {name: array for name, array in arrays.items() if name != missing}
        with pytest.raises(ValueError, match=rf"no array given for '{missing}' \(1 of 32 are missing\)"):
            dpa_jax.models.params_from_torch(small(), others)


def test_a_model_without_pytorch_names_is_refused():
    with pytest.raises(ValueError, match="Dense has no PyTorch names"):
        dpa_jax.models.params_from_torch(nn.Dense(3), {})
