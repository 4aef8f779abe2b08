"""Pure array functions: norms, activations, positions, masks, attention over views."""
