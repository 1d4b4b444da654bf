"""Lightning callbacks: when allocation happens, and what is shown while training."""
