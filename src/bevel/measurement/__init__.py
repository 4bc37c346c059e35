"""What an exported file costs and gives, measured where it runs."""
