"""What Lightning calls: the training module, the optimiser, checkpoints, callbacks and loggers."""
