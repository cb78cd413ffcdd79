"""Rules by family: importing this package registers them all."""

from hesscale_lightning.curvature.rules import (
    arithmetic,
    attention,
    convolution,
    copy_slices,
    distance,
    distributed,
    embedding,
    indexing,
    linalg,
    linear,
    losses,
    normalization,
    pointwise,
    pooling,
    recurrent,
    reduction,
    selection,
    shape,
    softmax,
    special,
)
