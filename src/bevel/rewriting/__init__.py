"""Model surgery: layers that are dear on embedded processors become cheap ones."""
