"""The deployment kit: a finished run as one zip that classifies images on the device."""

from bevel.packaging.kit import Kit, package

__all__ = ["Kit", "package"]
