"""The ground every stage stands on: recipe, records, plugins, errors. Imports no torch."""
