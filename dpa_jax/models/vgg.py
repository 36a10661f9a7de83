"""VGG (Simonyan and Zisserman, 2015), as torchvision has it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from dpa_jax.checks import MAX_SIZE
from dpa_jax.models import convnet
from dpa_jax.models.plain import Convolution, PlainConvNet, Plan


class VGG(PlainConvNet):
    """Stages of 3 x 3 convolutions, a max pool after each, and three dense layers; by default VGG-11.

    The dense layers see a grid of 7 x 7, 1 x 1 in the form for small images.

    Attributes (besides those of `PlainConvNet`; the last block is the last two convolutions):
        widths: for each stage, the features of its convolutions.
        batch_norm: whether a BatchNorm follows each convolution.
    """

    widths: Sequence[Sequence[int]] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    batch_norm: bool = False

    def __post_init__(self):
        convnet.check_list("VGG", "widths", self.widths, "stages", (1, 10))
        for i, stage in enumerate(self.widths):
            convnet.check_numbers("VGG", f"widths[{i}]", stage, "widths", (1, 100), MAX_SIZE)
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """The activations of the last two convolutions."""
        number = sum(map(len, self.widths))
        return f"activation{number - 1}", f"activation{number}"

    @property
    def plan(self) -> Plan:
        """The layers."""
        return Plan(
            stages=tuple(tuple(Convolution(width, 3, 1, 1) for width in stage) for stage in self.widths),
            pool=2,
            grid=1 if self.small_images else 7,
            conv=convnet.fan_out_conv,
            dense=convnet.normal_dense,
            norm=self.batch_norm,
            dropout_first=False,
        )

    # In timm the hidden layers are convolutions.
    torch_aliases: ClassVar[Mapping[str, str | None]] = {
        r"^pre_logits\.fc1\.": "classifier.0.",
        r"^pre_logits\.fc2\.": "classifier.3.",
        r"^head\.fc\.": "classifier.6.",
    }
