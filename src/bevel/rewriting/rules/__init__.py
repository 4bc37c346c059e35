"""Surgery rules, one file each."""
