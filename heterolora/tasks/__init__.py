"""Tasks: what is read, the loss, the metrics, the predictions."""
