"""One streaming predictor for volumes and clips, which validation, evaluation, exports and `predict` share."""
