"""The streaming predictor for volumes and clips that validation, evaluation, exports and `predict` share."""
