"""What both sides of the wire agree on. Imports nothing else of this project."""
