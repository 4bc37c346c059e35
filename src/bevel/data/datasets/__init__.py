"""One data set per file; each defines `load(section: DataSection) -> Splits`."""
