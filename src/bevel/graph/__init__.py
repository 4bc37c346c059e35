"""What a network does, seen from one recorded forward pass: its couplings and its cost."""
