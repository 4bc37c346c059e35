"""Contract suites that anyone can inherit for their own plugins."""
