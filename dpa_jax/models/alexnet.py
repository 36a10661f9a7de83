"""AlexNet (Krizhevsky et al., 2012) in its form with one tower (Krizhevsky, 2014), as torchvision has it."""

from collections.abc import Sequence

from dpa_jax.checks import MAX_SIZE
from dpa_jax.models import convnet, layers
from dpa_jax.models.plain import Convolution, PlainConvNet, Plan


class AlexNet(PlainConvNet):
    """Five convolutions and three dense layers; max pools follow the first, second and fifth convolution.

    Its form for small images has kernels of 3 x 3, the first at stride 2, and pools of 2 x 2; the other needs images of
    63 pixels.

    Attributes (besides those of `PlainConvNet`; the last block is ``activation5``):
        widths: features of the convolutions.
    """

    widths: Sequence[int] = (64, 192, 384, 256, 256)

    def __post_init__(self):
        convnet.check_numbers("AlexNet", "widths", self.widths, "widths", (5, 5), MAX_SIZE)
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """The activation of the last convolution."""
        return ("activation5",)

    @property
    def plan(self) -> Plan:
        """The layers."""
        if self.small_images:
            pool, grid, kernels = 2, 2, [(3, 2, 1)] + [(3, 1, 1)] * 4
        else:
            pool, grid, kernels = 3, 6, [(11, 4, 2), (5, 1, 2)] + [(3, 1, 1)] * 3
        convolutions = [Convolution(width, *kernel) for width, kernel in zip(self.widths, kernels, strict=True)]
        return Plan(
            stages=((convolutions[0],), (convolutions[1],), tuple(convolutions[2:])),
            pool=pool,
            grid=grid,
            conv=layers.uniform_conv,
            dense=layers.uniform_dense,
            norm=False,
            dropout_first=True,
        )
