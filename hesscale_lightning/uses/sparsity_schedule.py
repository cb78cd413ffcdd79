"""How much to prune after each epoch."""


class SparsitySchedule:
    r"""Pruning in steps, at the end of each epoch, until a sparsity is reached: the amount for HesScalePruning.

    After epoch :math:`e` from ``begin_epoch`` :math:`b` to ``end_epoch`` :math:`f`, the pruned fraction of entries is

    .. math:: s_e = s_f \Bigl(1 - \bigl(1 - \tfrac{e - b + 1}{f - b + 1}\bigr)^k\Bigr),

    so that most is pruned early, while there is time to train what is left. An amount counts what is not pruned yet,
    and is :math:`(s_e - s_{e-1}) / (1 - s_{e-1})`.

    Args:
        final_sparsity: The fraction that is pruned in the end, from 0 to below 1.
        begin_epoch: The first epoch after which to prune.
        end_epoch: The last one.
        exponent: :math:`k`; 1 prunes evenly.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> amount = SparsitySchedule(0.75, begin_epoch=2, end_epoch=3, exponent=1)
        >>> [amount(epoch) for epoch in range(5)]  # of 80 entries 30 go after epoch 2, and 30 of the other 50 after 3
        [0.0, 0.0, 0.375, 0.6, 0.0]

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.
    """

    def __init__(self, final_sparsity: float, begin_epoch: int = 0, end_epoch: int = 0, exponent: float = 3.0) -> None:
        if not 0 <= final_sparsity < 1:
            raise ValueError(f"Found final_sparsity={final_sparsity}, expected at least 0 and less than 1.")
        if not 0 <= begin_epoch <= end_epoch:
            raise ValueError(f"Found epochs {begin_epoch} to {end_epoch}, expected 0 <= begin_epoch <= end_epoch.")
        if not exponent > 0:
            raise ValueError(f"Found exponent={exponent}, expected more than 0.")
        self.final_sparsity = final_sparsity
        self.begin_epoch = begin_epoch
        self.end_epoch = end_epoch
        self.exponent = exponent

    def sparsity(self, epoch: int) -> float:
        """The fraction that is pruned after an epoch."""
        done = (epoch - self.begin_epoch + 1) / (self.end_epoch - self.begin_epoch + 1)
        return float(self.final_sparsity * (1 - (1 - min(max(done, 0.0), 1.0)) ** self.exponent))

    def __call__(self, epoch: int) -> float:
        """How much of what is left to prune after an epoch."""
        before = self.sparsity(epoch - 1)
        return (self.sparsity(epoch) - before) / (1 - before)
