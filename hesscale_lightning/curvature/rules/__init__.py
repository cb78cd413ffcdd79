from hesscale_lightning.curvature.rules import arithmetic, linear, losses, normalization, pointwise, reduction, softmax
