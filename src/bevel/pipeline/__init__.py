"""The only place that orders the stages: from a recipe to a measured, reported run."""
