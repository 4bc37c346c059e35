"""What a deployment kit takes to the device: a program without bevel, for Python 3.9 and newer."""
