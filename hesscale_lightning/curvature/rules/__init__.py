from hesscale_lightning.curvature.rules import linear, tmp
