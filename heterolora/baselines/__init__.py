"""Methods of other libraries, run as they are there, under the same conditions as everything else."""
