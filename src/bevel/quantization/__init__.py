"""From float to 8-bit integers: which tensors, with which types, and from which ranges."""
