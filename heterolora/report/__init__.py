"""What a run leaves behind for people: tables, pictures, files."""
