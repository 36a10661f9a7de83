"""Image augmentation on the device, for use under jit and vmap.

Every random operation is a pure function of a typed key and one image [H, W, C], uint8 until it is normalised.
A train transform is a list of `(key, image) -> image` functions; an operation is added by putting it into the list.
"""

from dpa_jax.data.augment.color import adjust_hue as adjust_hue
from dpa_jax.data.augment.color import color_jitter as color_jitter
from dpa_jax.data.augment.crop import center_crop as center_crop
from dpa_jax.data.augment.crop import random_crop as random_crop
from dpa_jax.data.augment.crop import random_erasing as random_erasing
from dpa_jax.data.augment.crop import random_flip as random_flip
from dpa_jax.data.augment.crop import random_resized_crop as random_resized_crop
from dpa_jax.data.augment.mixing import mix as mix
from dpa_jax.data.augment.operations import OPERATIONS as OPERATIONS
from dpa_jax.data.augment.operations import apply_op as apply_op
from dpa_jax.data.augment.policy import Policy as Policy
from dpa_jax.data.augment.policy import parse_policy as parse_policy
from dpa_jax.data.augment.policy import rand_augment as rand_augment
from dpa_jax.data.augment.resample import resize as resize
from dpa_jax.data.augment.resample import resized_crop as resized_crop
from dpa_jax.data.augment.transforms import eval_transform as eval_transform
from dpa_jax.data.augment.transforms import normalize as normalize
from dpa_jax.data.augment.transforms import train_transform as train_transform
from dpa_jax.data.batch import Mixed as Mixed
from dpa_jax.data.boxes import box_from_draws as box_from_draws
