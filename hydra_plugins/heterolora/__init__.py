"""What heterolora adds to Hydra: launchers that lose no job, and a sweeper that asks Optuna."""
