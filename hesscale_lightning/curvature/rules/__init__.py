"""Rules by family: importing this package registers them all."""

from hesscale_lightning.curvature.rules import (
    arithmetic,
    convolution,
    copy_slices,
    distributed,
    embedding,
    indexing,
    linear,
    losses,
    normalization,
    pointwise,
    pooling,
    reduction,
    selection,
    shape,
    softmax,
)
