"""The HTML page about runs: read from their folders, drawn as figures, rendered as one file."""
