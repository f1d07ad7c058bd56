"""Whether what difftune promises holds on this machine, for this model: two ways of one computation, compared."""
