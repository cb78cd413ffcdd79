"""The diagonal at work: over a data set, and for pruning, quantization and Laplace posteriors."""
