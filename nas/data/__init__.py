"""Images for training, calibration and evaluation. They are decoded when they are asked for."""
