from hesscale_lightning.curvature.rules import (
    arithmetic,
    convolution,
    copy_slices,
    indexing,
    linear,
    losses,
    normalization,
    pointwise,
    pooling,
    reduction,
    shape,
    softmax,
)
